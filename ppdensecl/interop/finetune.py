"""A pre-trained backbone as the file that another project fine-tunes from.

The suites match names and only warn where a tensor finds no place, so that fine-tuning then starts from random weights
without a word. Here a file is good only after the receiving project's own model, loaded in its own way, has taken every
tensor and gives our feature maps.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import paddle

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import convert, layouts
from ppdensecl.interop.foreign import read
from ppdensecl.models import ResNet
from ppdensecl.models.resnet import BLOCKS

SUFFIXES = {"paddleseg": (".pdparams",), "paddledet": (".pdparams",), "paddleclas": (".pdparams",),
            "torch": (".pth", ".pt", ".safetensors")}
SIZES = (64, 96), (97, 65)  # of the pictures on which maps are compared: even and odd, wide and high
TOLERANCE = 1e-5  # of the largest value


def names(project, depth, ours):
    """{our name: name in the file} of `ours`, all tensors of a ResNet of `depth`; PaddleDetection's are in its module."""
    if project == "paddleclas":
        return {name: _paddleclas_name(depth, name) for name in ours}
    if project == "torch":
        return {name: next(iter(layouts.to_torch({name: np.empty(0)}, "backbone"))) for name in ours}
    return {name: name for name in ours}  # DenseCLResNet… is this project's ResNet


def export(source, out, project):
    """Writes the backbone of a checkpoint, whosever it is, to `out` for `project`. Returns sentences for the user.

    Raises UserError, and leaves no file, where the project would not load all of it or has other feature maps.
    """
    out = Path(out)
    if not out.name.endswith(SUFFIXES[project]):
        raise UserError(f"{out}: a file for {project} ends in {' or '.join(SUFFIXES[project])}")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder for {out.name}; make it first, or give another one")
    found = read(source, backbone=True)
    if out.exists() and os.path.samefile(out, found.file):
        raise UserError(f"{out}: is the file that is read; give another one to write")
    if found.stages < 4:
        raise UserError(f"{found.file}: has {found.stages} of a ResNet's 4 stages; {project} needs all")
    odd = [name for name, array in found.arrays.items() if not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{found.file}: not all numbers are finite in {layouts.listed(odd)}; give another checkpoint")
    ours = ResNet(found.depth)
    checkpoint.set_weights(ours, found.arrays, found.file)
    ours.eval()
    temporary = out.with_name(f".{out.stem}.tmp{os.getpid()}{out.suffix}")
    try:
        loaded = _WRITE[project](found, ours, temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return [found.description(), *found.notes, f"written: {out}; {loaded}"]


def _paddleseg(found, ours, path):
    try:
        from ppdensecl.interop import paddleseg_components as plugin
    except ImportError as error:
        raise _missing("PaddleSeg", error) from error
    plan = names("paddleseg", found.depth, found.arrays)
    checkpoint.write_arrays(path, {plan[name]: array for name, array in found.arrays.items()})
    theirs = getattr(plugin, f"DenseCLResNet{found.depth}")(output_stride=32)
    count = plugin.load(theirs, str(path))
    theirs.eval()
    return f"PaddleSeg loads all {count} tensors; {_same_maps(ours.stages, theirs)}"


def _paddledet(found, ours, path):
    try:
        from ppdensecl.interop import paddledet_backbone as plugin
    except ImportError as error:
        raise _missing("PaddleDetection", error) from error
    checkpoint.write_arrays(path, plugin.export(found.arrays, found.depth))
    theirs = plugin.TheirResNet(depth=found.depth, variant="b", freeze_at=-1, freeze_norm=False, return_idx=[0, 1, 2, 3])
    count = plugin.load(theirs, str(path))
    theirs.eval()
    maps = _same_maps(ours.stages, lambda x: theirs({"image": x}))
    return f"PaddleDetection loads all {count} tensors{_more(count, found)}; {maps}"


def _paddleclas_name(depth, name):
    """PaddleClas numbers the blocks through all stages, and the convolutions from 0."""
    parts = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if not parts:  # conv1.weight, bn1.bias, …
        kind, leaf = name.split("1.")
        return f"stem.0.{kind}.{leaf}"
    stage, block, kind, number, part, leaf = parts.groups()
    branch, kind = ("short", ("conv", "bn")[int(part)]) if part else (f"conv{int(number) - 1}", kind)
    return f"blocks.{sum(BLOCKS[depth][:int(stage) - 1]) + int(block)}.{branch}.{kind}.{leaf}"


def _paddleclas(found, ours, path):
    try:
        from ppcls.arch.backbone.legendary_models import resnet
        from ppcls.utils import logger
        from ppcls.utils.save_load import load_dygraph_pretrain
    except ImportError as error:
        raise UserError(f"a file for PaddleClas is good once PaddleClas has loaded it, but that cannot be imported ({error}); "
                        "put the folder of a clone into PYTHONPATH") from error
    plan = names("paddleclas", found.depth, found.arrays)
    arrays = {plan[name]: array for name, array in found.arrays.items()}
    if found.depth < 50:
        arrays.update({f"blocks.0.short.bn.{leaf}": np.full(64, value, np.float32) for leaf, value in (
            ("weight", 1), ("bias", 0), ("_mean", 0), ("_variance", 1))})
        arrays["blocks.0.short.conv.weight"] = np.eye(64, dtype=np.float32)[..., None, None] * np.float32((1 + 1e-5) ** 0.5)
    checkpoint.write_arrays(path, arrays)
    logger.init_logger()  # or its first message fails
    theirs = getattr(resnet, f"ResNet{found.depth}")()
    load_dygraph_pretrain(theirs, str(path))
    theirs.eval()
    state = {name: value.numpy() for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    unfit = [name for name in {**state, **arrays} if not np.array_equal(state.get(name), arrays.get(name))]
    if unfit:
        raise UserError(f"PaddleClas loads {len(state) - len(unfit)} of {len(state)} tensors; these do not fit: "
                        + layouts.listed(unfit))

    def maps(x):
        x, found_maps, ends = theirs.max_pool(theirs.stem(x)), [], np.cumsum(BLOCKS[found.depth])
        for number, block in enumerate(theirs.blocks, 1):
            x = block(x)
            found_maps += [x] if number in ends else []
        return found_maps

    return f"PaddleClas loads all {len(arrays)} tensors{_more(len(arrays), found)}; {_same_maps(ours.stages, maps)}"


def _torch(found, ours, path):
    convert.to_torch(found.file, str(path), backbone=True)
    back = read(str(path), backbone=True)
    theirs = ResNet(back.depth)
    checkpoint.set_weights(theirs, back.arrays, path)
    theirs.eval()
    return f"read back, all {len(back.arrays)} tensors (under 'state_dict' in a .pth); {_same_maps(ours.stages, theirs.stages)}"


_WRITE = {"paddleseg": _paddleseg, "paddledet": _paddledet, "paddleclas": _paddleclas, "torch": _torch}


def _more(count, found):
    """The suites' ResNet-18 and 34 have a convolution beside their first block, where ResNet has the identity."""
    more = count - len(found.arrays)
    return f" ({more} of them make the extra convolution beside its first block the identity, in eval mode)" if more else ""


def _missing(name, error):
    return UserError(f"a file for {name} is good once {name} has loaded it, but that cannot be imported ({error}); "
                     "install it as requirements.txt says")


@paddle.no_grad()
def _same_maps(our_maps, their_maps):
    """A sentence with the largest difference of the four feature maps of random pictures. Raises UserError beyond TOLERANCE."""
    generator, worst = np.random.default_rng(0), 0.0
    for size in SIZES:
        x = paddle.to_tensor(generator.standard_normal((1, 3, *size), dtype=np.float32))
        a_maps, b_maps = ([map.numpy() for map in maps(x)] for maps in (our_maps, their_maps))
        if [a.shape for a in a_maps] != [b.shape for b in b_maps]:
            raise UserError(f"the receiving model's feature maps have shapes {[list(b.shape) for b in b_maps]}, expected "
                            f"{[list(a.shape) for a in a_maps]}")
        for a, b in zip(a_maps, b_maps):
            worst = np.maximum(worst, np.abs(a - b).max() / np.abs(a).max())  # of NaN and a number, NaN
    if not worst <= TOLERANCE:
        raise UserError(f"the receiving model's feature maps differ by {worst:.1e} of the largest value; at most {TOLERANCE} is "
                        "right")
    return f"feature maps are ours, to {worst:.0e} of the largest value"
