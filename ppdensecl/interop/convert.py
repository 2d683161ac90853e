"""Checkpoints of PyTorch and of other projects into ours, and back.

float32 numbers stay the same bit for bit. Two things have no place in Paddle's files and are kept beside the weights for
the way back: the counters of PyTorch's BatchNorm, and whose names it were.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import paddle

import ppdensecl
from ppdensecl.config import build_config
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.files import replacing
from ppdensecl.interop import layouts, torch_file
from ppdensecl.interop.foreign import read
from ppdensecl.models import DenseCL, ResNet


def to_paddle(source, out, backbone=False, config=None):
    """Writes what `source` holds as a checkpoint of ours, or its backbone alone. Returns sentences for the user.

    `out` with or without .pdparams. A whole model becomes a checkpoint from which training goes on, of the run `config`
    or of the recipe with the sizes found. Raises UserError.
    """
    stem = out[:-len(".pdparams")] if out.endswith(".pdparams") else out
    found = read(source, backbone)
    if found.layout == "ours" and found.whole:
        raise UserError(f"{found.file}: is a checkpoint of this project already; add --backbone or --to torch")
    written = [stem + suffix for suffix in (checkpoint.SUFFIXES if found.whole else (".pdparams", ".json"))]
    _check_output(found, written)
    notes = [found.description(), *_left_out(found, kept=written[-1]), *found.notes]
    origin = {"file": Path(found.file).name, "sha256": checkpoint.sha256_of(found.file), **found.origin}
    if not found.whole:
        _compare(found, ResNet(found.depth, stages=found.stages))
        checkpoint.write_arrays(written[0], found.arrays)
        origin = {**origin, "layout": "backbone", "copies": False, "written_sha256": checkpoint.sha256_of(written[0])}
        with replacing(written[1]) as file:
            file.write(json.dumps(origin, indent=1).encode())
        return [*notes, f"written: {written[0]} ({len(found.arrays)} entries), and {written[1]} with where they are from"]
    config = _config(found, config)
    _compare(found, DenseCL(**config.model.model_dump(), seed=config.seed))
    epoch, iteration = found.epoch or 0, found.iteration or 0
    per_epoch = iteration // epoch if epoch and iteration and iteration % epoch == 0 else None
    if epoch and not iteration:  # resuming scales this to the iterations that an epoch has then
        iteration, per_epoch = epoch, 1
    states = {"epoch": epoch, "iteration": iteration, "iters_per_epoch": per_epoch, "global_batch": None, "world_size": None,
              "pictures": None, "scaler": None, "config": config.model_dump(),
              "versions": {"ppdensecl": ppdensecl.__version__, "paddle": paddle.__version__}, "converted": origin}
    checkpoint.save(Path(stem).parent, Path(stem).name, found.arrays,
                    {f"{name}/velocity_0": array for name, array in found.momentum.items()}, states, latest=False)
    return [*notes, found.momentum_note, f"written: {', '.join(written)}; go on with tools/train.py --resume {stem}"]


def to_torch(source, out, backbone=False):
    """Writes what `source` holds as a PyTorch or safetensors file, by the suffix of `out`. Returns sentences for the user.

    A whole model goes back to the names that it came with, where those were of PyTorch, else to the authors'; a backbone
    to torchvision's. Raises UserError.
    """
    found = read(source, backbone)
    _check_output(found, [out])
    _compare(found, DenseCL(**_config(found, None).model.model_dump()) if found.whole
             else ResNet(found.depth, stages=found.stages))
    layout = found.origin["layout"] if found.origin["layout"] in ("mmpretrain", "moco") else "densecl"
    layout = layout if found.whole else "backbone"
    arrays = layouts.to_torch(found.arrays, layout, layout == "densecl" and found.origin["copies"],
                              found.origin["batches_tracked"], found.whole and found.origin["wrapped"])
    progress = {name: value for name, value in (("epoch", found.epoch), ("iter", found.iteration)) if value is not None}
    if out.endswith(".safetensors"):
        torch_file.write_safetensors(out, arrays, {"format": "pt", **{name: str(value) for name, value in progress.items()}})
    else:
        torch_file.write(out, {"state_dict": arrays, "meta": {**progress, "ppdensecl_version": ppdensecl.__version__}})
    notes = ["left out: the optimizer's momentum"] if found.whole else []
    return [found.description(), *_left_out(found), *found.notes, *notes,
            f"written: {out}, {len(arrays)} entries, {layouts.LAYOUTS[layout]}"]


def _left_out(found, kept=None):
    """Sentences; without `kept`, the file where counters are kept, PyTorch's own entries are written again."""
    for reason, number in found.left_out.items():
        copies = reason.startswith("copies")
        if kept or not (copies or reason == layouts.COUNTERS):
            why = "; equal bit for bit" if copies else f"; kept in {kept}" if reason == layouts.COUNTERS else ""
            yield f"left out: {reason} ({number} entries{why})"


def _check_output(found, written):
    folder = Path(written[0]).parent
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder for {Path(written[0]).name}; make it first, or give another one")
    for path in written:
        if os.path.exists(path) and os.path.samefile(path, found.file):
            raise UserError(f"{path}: is the file that is read; give another one to write")


def _config(found, config):
    """The config of a run that has this model; a given one must agree with what the file holds. Raises UserError."""
    def size(name, axis, default):
        array = found.arrays.get(name)
        return default if array is None or array.ndim != 2 else array.shape[axis]

    fc1, fc2 = "encoder_q.head.global_fc1.weight", "encoder_q.head.global_fc2.weight"
    width = 64 * 2 ** (found.stages - 1) * (1 if found.depth < 50 else 4)
    sizes = {"backbone": f"resnet{found.depth}", "stages": found.stages, "hidden_dim": size(fc1, 1, width),
             "embedding_dim": size(fc2, 1, 128), "queue_len": size("queue.keys", 0, 65536)}
    # Before a model of these sizes is made: a small file must not ask for a large one.
    for name, shape in ((fc1, (width, sizes["hidden_dim"])), (fc2, (sizes["hidden_dim"], sizes["embedding_dim"])),
                        ("queue.keys", (sizes["queue_len"], sizes["embedding_dim"]))):
        if name in found.arrays and found.arrays[name].shape != shape:
            raise UserError(f"{found.file}: '{name}' has shape {list(found.arrays[name].shape)}, expected {list(shape)}")
    if config is None:
        sizes["hidden_dim"] = None if sizes["hidden_dim"] == width else sizes["hidden_dim"]
        return build_config({"model": sizes if found.dense else {**sizes, "loss_lambda": 0.0}}, name=found.file)
    for key, value in sizes.items():
        given = getattr(config.model, key) or width
        if given != value:
            raise UserError(f"'model.{key}' is {given} in the config, but {found.file} holds a model with {value}; "
                            f"use -o model.{key}={value}")
    if found.dense != (config.model.loss_lambda > 0):
        raise UserError(f"'model.loss_lambda' is {config.model.loss_lambda} in the config, but {found.file} holds a "
                        + ("DenseCL model; use a λ greater than 0" if found.dense else "MoCo-v2 model; use 0"))
    return config


def _compare(found, model):
    """Every entry of the model must be in the file, in its shape and type, and no other. Raises UserError."""
    expected = {name: (list(value.shape), str(value.dtype).rpartition(".")[2]) for name, value in model.state_dict().items()}
    layout = found.layout if found.whole else "backbone"
    missing, unknown = ([name for name in a if name not in b] for a, b in ((expected, found.arrays), (found.arrays, expected)))
    for names, what in ((missing, "are missing"), (unknown, "belong to no part of the model")):
        if names:
            theirs = layouts.to_torch(dict.fromkeys(names, np.empty(0)), layout)
            raise UserError(f"{found.file}: {len(names)} entries {what}: {layouts.listed(theirs)}"
                            + ("; --backbone takes the backbone alone" if found.whole else ""))
    for name, array in found.arrays.items():
        if [list(array.shape), str(array.dtype)] != list(expected[name]):
            raise UserError(f"{found.file}: '{name}' has shape {list(array.shape)} and type {array.dtype}, "
                            "expected {} and {}".format(*expected[name]))
