"""A backbone as two files to publish, and the proof that what was fetched is what was published.

NAME-<first 8 hex digits of its sha256>.pdparams holds the query encoder's backbone and nothing else: float32 arrays under
torchvision's names. The .json beside it says what it is and how it was trained, and has a checksum of itself.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import paddle

import ppdensecl
from ppdensecl.config import load_config
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation.features import architecture
from ppdensecl.interop import layouts
from ppdensecl.interop.foreign import read
from ppdensecl.models import ResNet

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PATHS = {"": ("output_dir",), "data": ("root", "list_file", "annotation")}


def pack(source, folder, name, licence=None):
    """Writes the backbone of a checkpoint, whosever it is, and its metadata into `folder`. Returns sentences for the user.

    The same checkpoint gives the same bytes. Of the paths in its config only the last part is kept. Raises UserError.
    """
    folder = Path(folder)
    if not re.fullmatch(_NAME, name):
        raise UserError(f"--name {name}: expected letters, digits, dots, - and _, such as densecl_r50_coco_800ep")
    found = read(source, backbone=True)
    model = _resnet(found.arrays, found.file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --out") from None
    temporary = folder / f".{name}.tmp{os.getpid()}.pdparams"
    facts, notes = _training(found)
    try:
        checkpoint.write_arrays(temporary, {key: value.numpy() for key, value in model.state_dict().items()})
        digest = checkpoint.sha256_of(temporary)
        out = folder / f"{name}-{digest[:8]}.pdparams"
        if out.exists() and out.samefile(found.file):
            raise UserError(f"{out}: is packed already")
        facts = {"name": name, "file": out.name, "sha256": digest, **_counts(model), **facts, "license": licence or "not stated"}
        checkpoint.write_text(out.with_suffix(".json"), json.dumps({**facts, "checksum": _checksum(facts)}, indent=1) + "\n")
        os.replace(temporary, out)  # last: where it is, it can be verified
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --out") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return [found.description(), *found.notes, *notes, f"written: {out} and {out.with_suffix('.json').name}, {_size(facts)}"]


def verify(path):
    """A sentence, once a packed file is found whole, complete, finite and the one that its name and metadata say.

    Raises UserError where anything of this does not hold.
    """
    path = Path(path)
    named = re.fullmatch(rf"({_NAME})-([0-9a-f]{{8}})\.pdparams", path.name)
    if not named:
        raise UserError(f"{path}: expected the name NAME-<8 hex digits>.pdparams that tools/model_zoo.py pack gave it")
    try:
        digest = checkpoint.sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not digest.startswith(named[2]):
        raise UserError(f"{path}: damaged or renamed, its sha256 begins with {digest[:8]}; fetch it again")
    facts = _metadata(path.with_suffix(".json"))
    if (facts["name"], facts["file"], facts["sha256"]) != (named[1], path.name, digest):
        raise UserError(f"{path.with_suffix('.json')}: is not of {path.name}, but of {facts['file']}; fetch it again")
    arrays = checkpoint.read_arrays(path)
    if _counts(_resnet(arrays, path)) != {key: facts[key] for key in ("architecture", "stages", "tensors", "parameters")}:
        raise UserError(f"{path}: holds something else than its metadata say ({_size(facts)}); pack it again")
    return f"{path}: whole, {_size(facts)}, all finite; sha256 {digest} as its name and metadata say"


def _resnet(arrays, file):
    """The ResNet with all of `arrays`, every one of which must be known, finite and float32."""
    depth, stages = architecture(arrays, file)
    odd = [name for name, array in arrays.items() if array.dtype != np.float32 or not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{file}: not all is float32 and finite in {layouts.listed(odd)}; give another checkpoint")
    model = ResNet(depth, stages=stages)
    checkpoint.set_weights(model, arrays, file)
    return model


def _counts(model):
    sizes = {name: value.numpy().size for name, value in model.state_dict().items()}
    return {"architecture": f"resnet{model.depth}", "stages": len(model.feat_channels), "tensors": len(sizes),
            "parameters": sum(size for name, size in sizes.items() if not name.endswith(("._mean", "._variance")))}


def _size(facts):
    stages = "" if facts["stages"] == 4 else f" ({facts['stages']} of 4 stages)"
    return f"{facts['architecture']}{stages}, {facts['tensors']} tensors, {facts['parameters'] / 1e6:.2f} million parameters"


def _training(found):
    """({what the metadata say of the training}, sentences for the user)."""
    states_file, notes = Path(found.file).with_suffix(".pdstates"), []
    states = checkpoint.verify(states_file) if states_file.is_file() else {}
    config = None if states.get("converted") else states.get("config")  # of a converted one it is only the recipe's
    beside = Path(found.file).with_name("config.yaml")
    ours = found.layout == "ours" or found.file.endswith(".pdparams")  # beside others' files may lie anything
    if ours and not states and beside.is_file():
        try:
            config = load_config(beside).model_dump()
        except UserError:
            notes.append(f"left out: {beside}, which is no config of this project")
    date = states.get("saved_at")
    if date is not None:
        date = datetime.datetime.fromtimestamp(date, datetime.timezone.utc).date().isoformat()
    return {"epoch": found.epoch, "iteration": found.iteration, "date": date, "config": _without_paths(config),
            "versions": states.get("versions"),
            "source": {"kind": layouts.LAYOUTS[found.layout], "sha256": checkpoint.sha256_of(found.file)}}, notes


def _without_paths(config):
    """What a path is called tells of the data; where it lay is nobody's business."""
    if config is None:
        return None
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for section, keys in _PATHS.items():
        part = config.get(section, {}) if section else config
        part.update({key: Path(part[key]).name for key in keys if part.get(key)})
    return config


def _metadata(file):
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        checksum = facts.pop("checksum")
        if checksum != _checksum(facts):
            raise ValueError
        return facts
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the metadata belong beside the weights, fetch them too") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f"{file}: damaged (its checksum is wrong); fetch it again") from None


def _checksum(facts):
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
