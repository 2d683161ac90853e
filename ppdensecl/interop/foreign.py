"""What a checkpoint holds, whosever it is: PyTorch's, safetensors, PASSL's or ours, in our names, numbers and directions.

PyTorch is not needed, and nothing that a file asks for is run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation.features import architecture
from ppdensecl.interop import layouts, torch_file
from ppdensecl.interop.safetensors_file import read_safetensors_metadata, show, widen


class Found(NamedTuple):
    file: str  # that was read
    layout: str
    arrays: dict  # {our name: array}; of a backbone alone under torchvision's names
    whole: bool  # a pre-training checkpoint, not a backbone alone
    depth: int
    stages: int
    epoch: Optional[int]
    iteration: Optional[int]
    origin: dict  # for the way back: layout, copies, wrapped, batches_tracked (None, a number or {our name: number})
    left_out: dict  # {reason: number of entries}
    momentum: dict  # {our parameter's name: array}
    momentum_note: str
    notes: list  # sentences for the user

    @property
    def dense(self):
        return any(name.startswith(("encoder_q.head.dense_", "queue_dense.")) for name in self.arrays)

    def description(self):
        kind = "" if self.layout == "backbone" else "backbone of a "
        if self.whole:
            kind = "DenseCL " if self.dense else "MoCo-v2 "
        parts = [f"resnet{self.depth}"] + ([f"{self.stages} of 4 stages"] if self.stages < 4 else [])
        if "queue.keys" in self.arrays:
            parts.append(f"K = {len(self.arrays['queue.keys'])}")
        parts += [f"{word} {value}" for word, value in (("epoch", self.epoch), ("iteration", self.iteration))
                  if value is not None and self.whole]
        return f"{self.file}: {kind}{layouts.LAYOUTS[self.layout]}: {', '.join(parts)}"


def read(source, backbone=False):
    """What a .pdparams, a checkpoint of ours (also without suffix), a PyTorch or a safetensors file holds: Found.

    With `backbone` only the query encoder's backbone is taken. Raises UserError.
    """
    file = source if os.path.isfile(source) or not os.path.isfile(f"{source}.pdparams") else f"{source}.pdparams"
    content, notes = _content(file), []
    nested = content.get("state_dict")
    try:
        theirs = _plain(nested if isinstance(nested, dict) else content, file, notes)
        layout = layouts.recognise(theirs)
        arrays, left_out = layouts.translate(theirs, layout, backbone)
        whole = layout != "backbone" and not backbone
        counters = _counters(arrays, left_out.get(layouts.COUNTERS), layout if whole else "backbone")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    prefix = layouts.BACKBONE if whole else ""
    depth, stages = architecture([name[len(prefix):] for name in arrays if name.startswith(prefix)], file)
    epoch, iteration = _progress(content, file)
    if iteration is None and layout != "backbone":
        iteration = counters if not isinstance(counters, dict) else counters.get(f"{prefix}bn1.num_batches_tracked")
    origin = {"layout": layout, "copies": any(reason.startswith("copies") for reason in left_out),
              "batches_tracked": counters, "wrapped": layouts.is_wrapped(theirs)}
    if file.endswith(".pdparams"):  # Paddle's BatchNorm counts nothing, and the authors' code has copies
        (epoch, iteration), converted = _beside(file, layout, (epoch, iteration))
        origin = converted or {**origin, "copies": True, "batches_tracked": iteration or 0}
        if backbone and layout == "ours" and isinstance(origin["batches_tracked"], dict):
            origin = {**origin, "batches_tracked": {name[len(layouts.BACKBONE):]: count for name, count
                                                    in origin["batches_tracked"].items() if name.startswith(layouts.BACKBONE)}}
    momentum, momentum_note = _momentum(content.get("optimizer") if whole else None, arrays, layout)
    return Found(file, layout, arrays, whole, depth, stages, epoch, iteration, origin,
                 {reason: len(names) for reason, names in left_out.items()}, momentum, momentum_note, notes)


def _content(file):
    if file.endswith(".pdparams"):
        return checkpoint.read_nested(file)
    try:
        return torch_file.read(file)
    except UserError as error:
        if "mmengine" not in str(error):
            raise
        raise UserError(f"{error}; where mmengine is installed and the file is trusted, save the weights alone: torch.save("
                        f"{{'state_dict': torch.load('{file}', weights_only=False)['state_dict']}}, 'weights.pth')") from None


def _plain(arrays, file, notes):
    """The same names with float32 and int64 numbers. Raises UserError where an entry is not an array of numbers."""
    changed, result = Counter(), {}
    for name, array in arrays.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise UserError(f"entry '{show(name)}' is a {type(array).__name__}, not an array; expected names and arrays, at the "
                            "top or under 'state_dict'")
        if array.dtype.kind not in "fiu" or array.size == 0:
            raise UserError(f"'{show(name)}' is an array of {array.dtype} and shape {list(array.shape)}, expected numbers")
        kind = str(array.dtype)
        if kind == "uint16" and file.endswith(".pdparams"):
            kind, array = "bfloat16", widen(array, "bfloat16")  # as Paddle saves it
        result[name] = array.astype("float32" if array.dtype.kind == "f" else "int64", copy=False)
        if kind not in ("float32", "int64"):
            changed[kind, str(result[name].dtype)] += 1
    notes += [f"{count} entries of {before} became {after}" for (before, after), count in changed.items()]
    return result


def _counters(arrays, counters, layout):
    """What BatchNorm counted: one number where all that should be there are and agree, None where none are."""
    if not counters:
        return None
    for name, array in counters.items():
        if array.size != 1:
            raise UserError(f"'{show(name)}' has shape {list(array.shape)}, expected one number")
    counts = {name: int(array.item()) for name, array in counters.items()}
    same = layouts.to_torch(arrays, layout, batches_tracked=0).keys() - layouts.to_torch(arrays, layout).keys()
    return counts.popitem()[1] if len(same) == len(counts) and len(set(counts.values())) == 1 else counts


def _progress(content, file):
    """(epoch, iteration) as mmcv, mmengine, facebookresearch/moco, PASSL or this project wrote them; None where unknown."""
    meta = content.get("meta")
    if file.endswith(".safetensors"):
        meta = {name: int(text) for name, text in read_safetensors_metadata(file).items() if text.isdecimal() and len(text) < 16}
    meta = meta if isinstance(meta, dict) else {}
    return tuple(value if _is_count(value) else None for value in (meta.get("epoch", content.get("epoch")), meta.get("iter")))


def _is_count(value):
    return type(value) is int and 0 <= value < 2**53


def _beside(file, layout, progress):
    """((epoch, iteration), what the way back needs or None), from the .pdstates of a checkpoint of ours, or from the .json
    that was written with a converted backbone."""
    stem = file[:-len(".pdparams")]
    if layout == "ours":
        states = checkpoint.verify(stem) if os.path.exists(f"{stem}.pdstates") else {}
        progress = tuple(value if _is_count(value) else None for value in (states.get("epoch"), states.get("iteration")))
        return progress, _sound(states.get("converted"))
    try:
        converted = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # somebody else's, or none
        return progress, None
    converted = _sound(converted)
    return progress, converted if converted and converted.get("written_sha256") == checkpoint.sha256_of(file) else None


def _sound(converted):
    """`converted` as `convert` wrote it, else None."""
    if not isinstance(converted, dict) or converted.get("layout") not in list(layouts.LAYOUTS):
        return None
    counts = converted.get("batches_tracked")
    right = counts is None or all(map(_is_count, counts.values() if isinstance(counts, dict) else [counts]))
    return converted if right and {type(converted.get(key)) for key in ("copies", "wrapped")} == {bool} else None


def _momentum(optimizer, arrays, layout):
    """({our name: momentum buffer}, a sentence). PyTorch numbers the parameters as the model, and so its file, has them."""
    if optimizer is None:
        return {}, "momentum starts at zero: the file holds no optimizer"
    names = [name for name in arrays if not name.endswith(("._mean", "._variance")) and not name.startswith("queue")]
    learning = [name for name in names if name.startswith("encoder_q.")]
    found = {}
    try:
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        if len(numbers) not in (len(names), len(learning)):
            raise ValueError
        for number, name in zip(numbers, names):
            buffer = optimizer["state"].get(number, {}).get("momentum_buffer")
            if buffer is None:
                continue
            buffer = layouts.turned(name, buffer, layout)
            if name not in learning or buffer.shape != arrays[name].shape or buffer.dtype.kind != "f":
                raise ValueError
            found[name] = buffer.astype("float32", copy=False)
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}, "momentum starts at zero: the file's optimizer is not an SGD over this model's parameters"
    return found, f"momentum taken over for {len(found)} of {len(learning)} parameters" + (
        "" if len(found) == len(learning) else ", the others start at zero")
