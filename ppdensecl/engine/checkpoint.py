"""Checkpoints that are either whole or not there.

A checkpoint NAME is three files: NAME.pdparams (the model: both encoders, queues, pointers), NAME.pdopt (the optimizer) and
NAME.pdstates (JSON: epoch, iteration, seed, config, and the sha256 of the other two). Random numbers are counter-based, so
seed and iteration are the whole random state. Each file is written to a temporary name, synced and renamed, the
.pdstates last: whatever a crash leaves behind, its checksums tell.

The weights are pickled dicts of numpy arrays that `paddle.load` reads under any numpy. Reading allows arrays and plain
containers only: a file cannot run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import numpy as np
import paddle

from ppdensecl.data.source import sha256_of
from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import show
from ppdensecl.interop.torch_file import read_pickle

LATEST = "latest"
SUFFIXES = (".pdparams", ".pdopt", ".pdstates")


def save(folder, name, weights, optimizer, states, latest=True):
    """Writes checkpoint `name` in `folder` and makes `latest` the same. weights, optimizer: {name: array}; states: JSON."""
    folder = Path(folder)
    digests = {".pdparams": _write(folder / f"{name}.pdparams", _dump(weights)),
               ".pdopt": _write(folder / f"{name}.pdopt", _dump(optimizer))}
    # Later than all others even if the clock was set back: the newest is found, and kept, by this.
    others = [_saved_at(path) for path in folder.glob("*.pdstates")]
    saved_at = max([time.time(), *(after + 1e-3 for after in others if after != _UNREADABLE)])
    states = {**states, "saved_at": saved_at, "sha256": digests}
    states["checksum"] = _checksum(states)
    _write(folder / f"{name}.pdstates", lambda file: file.write(json.dumps(states, indent=1).encode()))
    for suffix in SUFFIXES if latest else ():
        _link(folder / (name + suffix), folder / (LATEST + suffix))
    _sync_folder(folder)


def prune(folder, keep_last):
    """Deletes all but the `keep_last` last saved numbered checkpoints (None keeps all)."""
    numbered = [path for path in _last_saved_first(folder) if path.stem != LATEST and _saved_at(path) != _UNREADABLE]
    for path in numbered[keep_last:] if keep_last else []:
        _remove(path)


def _remove(states_file):
    for suffix in reversed(SUFFIXES):  # .pdstates first: what is half deleted is no checkpoint
        states_file.with_suffix(suffix).unlink(missing_ok=True)


def exists(folder):
    return any(Path(folder).glob("*.pdstates"))


def remove_all(folder):
    """Deletes every checkpoint of a run, and nothing else."""
    for path in list(Path(folder).glob("*.pdstates")):
        _remove(path)


def remove_unfinished(folder):
    """Deletes what interrupted writes and deletions left."""
    for suffix in (*SUFFIXES, ".yaml"):
        for path in Path(folder).glob(f".*{suffix}.tmp*"):
            path.unlink()
    for suffix in SUFFIXES:
        for path in Path(folder).glob(f"*{suffix}"):
            if re.fullmatch(r"(iter|epoch)_\d+", path.stem) and not path.with_suffix(".pdstates").exists():
                path.unlink()


def newest(folder):
    """(path without suffix, states, notes) of the last saved checkpoint that is whole; notes name the damaged ones.

    Raises UserError where there is none.
    """
    notes = []
    for path in _last_saved_first(folder):
        try:
            return path.with_suffix(""), verify(path), notes
        except UserError as error:
            notes.append(str(error))
    if notes:
        raise UserError(f"{folder}: no checkpoint here is whole ({'; '.join(notes)}); start again with --overwrite")
    raise UserError(f"{folder}: there is no checkpoint to resume from; start without --resume")


def verify(path):
    """The states of a checkpoint, after its checksums are found right. `path` with or without suffix. Raises UserError."""
    stem = _stem(path)
    states_file = Path(f"{stem}.pdstates")
    try:
        states = _read_states(states_file)
        digests = states["sha256"]
        if not isinstance(digests, dict) or not set(digests) <= set(SUFFIXES):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{states_file}: no such file; give a checkpoint as its path without suffix") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{states_file}: damaged (its checksum is wrong); use an older checkpoint") from None
    for suffix, digest in digests.items():
        file = Path(f"{stem}{suffix}")
        try:
            found = sha256_of(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); use an older checkpoint") from None
        if found != digest:
            raise UserError(f"{file}: damaged (its checksum is wrong); use an older checkpoint")
    return states


def load_weights(path):
    """The model's arrays {name: array} of a checkpoint; `path` without suffix or the .pdparams. Raises UserError."""
    return read_arrays(path if os.path.isfile(path) else f"{_stem(path)}.pdparams")


def set_weights(model, arrays, path):
    """Sets every entry of the model's state from {name: array}; what is missing, left over or misshaped is a UserError."""
    state = model.state_dict()
    for kind, names in (("lacks", state.keys() - arrays.keys()), ("has an unknown", arrays.keys() - state.keys())):
        if names:
            raise UserError(f"{path} {kind} '{min(names)}' ({len(names)} such): it belongs to another model")
    for name, value in state.items():
        if list(value.shape) != list(arrays[name].shape):
            raise UserError(f"{path}: '{name}' has shape {list(arrays[name].shape)}, expected {list(value.shape)}")
        value.set_value(paddle.to_tensor(arrays[name], dtype=value.dtype))


def load_optimizer(path):
    return read_arrays(f"{_stem(path)}.pdopt")


def make_folder(path):
    """Makes a folder, and those above it, and gives its Path. Raises UserError where a file has that name, or it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder to write to ({error.strerror}); give another one") from None
    return Path(path)


def write_text(path, text):
    """Writes a text file, or leaves the old one. Raises UserError."""
    _write(Path(path), lambda file: file.write(text.encode()))


def write_arrays(path, arrays):
    """Writes {name: array} as a file that `paddle.load` reads."""
    _write(Path(path), _dump(arrays))
    _sync_folder(Path(path).parent)


def read_arrays(path):
    """Reads {name: array} from a file of ours or of `paddle.save`; refuses anything that is more. Raises UserError."""
    found = read_nested(path)
    odd = [name for name, value in found.items() if not (
        isinstance(name, str) and name.isprintable() and isinstance(value, np.ndarray) and value.dtype.kind in "fiub")]
    if odd:
        raise UserError(f"{path}: entry '{show(odd[0])}' is not an array of numbers; expected named arrays only")
    return found


def read_nested(path):
    """Like `read_arrays`, but values may also be dicts of arrays and plain values, or plain: others' whole checkpoints."""
    found = read_pickle(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected named arrays")
    return {key: _arrays(value) if type(value) is dict else _array(value) for key, value in _arrays(found).items()}


def _arrays(found):
    # "Structured…" is paddle.save's own book-keeping.
    return {key: _array(value) for key, value in found.items() if key != "StructuredToParameterName@@"}


def _array(value):
    if type(value) is tuple and len(value) == 2 and isinstance(value[1], np.ndarray):  # in a nested dict: (its name, the array)
        return value[1]
    return value


def _dump(arrays):
    # ndarray(shape, dtype, buffer) has had one name in all numpy versions; the default pickle names numpy 2's own modules.
    def portable(array):
        return np.ndarray, (array.shape, array.dtype.str, array.tobytes())

    def dump(file):
        pickler = pickle.Pickler(file, protocol=4)
        pickler.dispatch_table = {np.ndarray: portable}
        pickler.dump({name: np.asarray(value) for name, value in arrays.items()})
    return dump


class _HashingFile:
    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)


def _write(path, dump):
    """Lets dump(file) write to a temporary name, syncs, renames to `path`. Returns the sha256."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            dump(hashing)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, temporary, error) from None
    return hashing.sha256.hexdigest()


def _unwritable(path, temporary, error):
    with contextlib.suppress(OSError):
        temporary.unlink()
    return UserError(f"{path}: cannot be written ({error.strerror}); what was there before is untouched: free some space "
                     "or choose another folder, then go on (a training run with --resume)")


def _link(source, target):
    """Makes `target` the same file as `source`: a hard link where the file system has them, else a copy."""
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(target, temporary, error) from None


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_UNREADABLE = float("inf")


def _read_states(states_file):
    states = json.loads(states_file.read_text())
    if states["checksum"] != _checksum(states):
        raise ValueError
    return states


def _saved_at(states_file):
    try:
        return float(_read_states(states_file)["saved_at"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _UNREADABLE


def _last_saved_first(folder):
    """The .pdstates files of a folder; unreadable ones count as the last saved, so that they are looked at. Not ordered by
    iteration: a run that was taken up again from an old checkpoint goes on where it was last, not where it was farthest."""
    return sorted(Path(folder).glob("*.pdstates"), key=lambda path: (_saved_at(path), path.stem != LATEST), reverse=True)


def _checksum(states):
    rest = {key: value for key, value in states.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _stem(path):
    path = str(path)
    return next((path[:-len(suffix)] for suffix in SUFFIXES if path.endswith(suffix)), path)


def extract_backbone(path, out):
    """Writes the query encoder's backbone of a checkpoint to `out` under torchvision's names; returns the names."""
    prefix = "encoder_q.backbone."
    arrays = {name[len(prefix):]: value for name, value in load_weights(path).items() if name.startswith(prefix)}
    if not arrays:
        raise UserError(f"{path}: has no '{prefix}*' entries; give a checkpoint of a pre-training run")
    if Path(out).exists() and Path(out).samefile(path if os.path.isfile(path) else f"{_stem(path)}.pdparams"):
        raise UserError(f"{out}: is the checkpoint itself; give another file to write")
    write_arrays(out, arrays)
    return list(arrays)
