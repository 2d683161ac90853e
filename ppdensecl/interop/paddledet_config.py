"""PaddleDetection's config, read so that a file or an option cannot run code.

PaddleDetection reads its YAML with a loader that calls whatever a tag names (`!!python/object/apply:os.system`). Its own
tags, such as `!RandomFlip`, make objects of its own classes; these are all that is known here.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import paddle
import yaml
from ppdet.core.config import yaml_helpers
from ppdet.core.workspace import merge_config

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import show

_REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, OSError, RecursionError, TypeError, ValueError,
             yaml.YAMLError)


def read_config(path, overrides=()):
    """PaddleDetection's config of a file, with KEY=VALUE strings (values as in YAML) on top. Raises UserError.

    PaddleDetection has one config in a process. Keys of this project beside its own: `iterations` (to train, in place of
    `epoch`), `total_batch_size` (over all GPUs), `precise_bn` (batches, see `precise_bn.py`), `voc07` (also AP as VOC 2007
    counts it) and `seed` (of weights, order and crops; with worker_num above 0 the crops differ all the same).
    """
    changes = {}
    try:
        for item in overrides:
            key, sign, value = item.partition("=")
            if not sign:
                raise UserError(f"-o {item}: expected KEY=VALUE, e.g. TrainReader.batch_size=2")
            *parents, last = key.strip().split(".")
            here = functools.reduce(lambda part, name: part.setdefault(name, {}), parents, changes)
            here[last] = _parsed(value, f"-o {item}")
        _merge(str(path))
        config = merge_config({"filename": Path(path).stem, **changes})
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: PaddleDetection refuses it: {reason}") from error
    ranks = paddle.distributed.get_world_size()
    if config.get("total_batch_size"):
        if config.total_batch_size % ranks:
            raise UserError(f"'total_batch_size' is {config.total_batch_size}, which {ranks} GPUs cannot share evenly")
        config.TrainReader["batch_size"] = config.total_batch_size // ranks
    for key, least, what in (("precise_bn", 1, "batches"), ("seed", 0, "a seed")):
        value = config.get(key)
        if value is not None and (type(value) is not int or not least <= value < 2**32):
            raise UserError(f"'{key}' is {show(value)}, expected a whole number ({what}) from {least}, or null for none")
    folder = Path(config.save_dir) / config.filename  # where PaddleDetection writes its checkpoints
    config.output_eval, config.vdl_log_dir = str(folder), str(folder / "vdl")
    checkpoint.make_folder(folder)
    config.use_gpu = paddle.get_device().startswith("gpu")
    return config


def _merge(path):
    """Puts a file into PaddleDetection's config, after those that it names under `_BASE_`."""
    with open(path, encoding="utf-8") as file:
        content = _parsed(file.read(), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; give a file like those in configs/det/")
    for base in content.pop("_BASE_", []):
        _merge(os.path.join(os.path.dirname(path), os.path.expanduser(base)))
    merge_config(content)


def _parsed(text, where):
    # Not all of "!…": other libraries may have registered theirs, and `!Callable` is a call of any function.
    known = {tag: make for tag, make in yaml.Loader.yaml_constructors.items()
             if getattr(make, "__module__", None) == yaml_helpers.__name__ and tag != "!Callable"}
    loader = type("_Loader", (yaml.SafeLoader,), {"yaml_constructors": {**yaml.SafeLoader.yaml_constructors, **known}})
    try:
        return yaml.load(text, Loader=loader)
    except yaml.constructor.ConstructorError as error:
        mark = error.problem_mark
        raise UserError(f"{where}: line {mark.line + 1}: {error.problem}; only plain values and PaddleDetection's own classes "
                        "are read, and nothing was run") from None
