"""Frozen features: a backbone from any checkpoint, and what it says about pictures.

`extract` is what all probes stand on: one pass of a frozen backbone over a list of pictures, streamed to a .npy file and read
back as a memory map. The file's name is a digest of all that decides its contents, so that a second probe of the same
backbone on the same pictures extracts nothing; it has that name only when it is whole. Where there are several ranks each
computes its share of the pictures and writes it into the one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle

from ppdensecl import parallel
from ppdensecl.data.picture import UndecodableError
from ppdensecl.engine import checkpoint, device
from ppdensecl.errors import UserError
from ppdensecl.inference.exported import centre, whole  # the views that probes look at, and exported networks
from ppdensecl.models import ResNet
from ppdensecl.models.densecl import normalise
from ppdensecl.models.resnet import BLOCKS

_PREFIX = "encoder_q.backbone."
_FORMAT = 1  # of what the cache holds; raised when a view or the normalisation changes


def load_backbone(path):
    """The backbone of a checkpoint of ours (the query encoder's) or of an extracted one, in eval mode.

    `path` without suffix, or the .pdparams. Raises UserError, also when any entry is missing or left over.
    """
    arrays = checkpoint.load_weights(path)
    if any(name.startswith(_PREFIX) for name in arrays):
        arrays = {name[len(_PREFIX):]: value for name, value in arrays.items() if name.startswith(_PREFIX)}
    depth, stages = architecture(arrays, path)
    backbone = ResNet(depth, stages=stages)
    checkpoint.set_weights(backbone, arrays, path)
    backbone.eval()
    return backbone


def weights_file(path):
    """The file that `load_backbone` reads."""
    return str(path) if os.path.isfile(path) else f"{path}.pdparams"


def architecture(arrays, path):
    """(depth, number of stages) of the ResNet whose arrays have torchvision's names. Raises UserError."""
    blocks = tuple(len({m.group(1) for m in (re.match(rf"layer{stage}\.(\d+)\.", name) for name in arrays) if m})
                   for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in arrays
    stages = sum(count > 0 for count in blocks)
    for depth, expected in BLOCKS.items():
        if stages and blocks == expected[:stages] + (0,) * (4 - stages) and bottleneck == (depth >= 50):
            return depth, stages
    raise UserError(f"{path}: holds no ResNet that is known here (18, 34, 50, 101, 152); give a checkpoint of a "
                    "pre-training run or a backbone extracted from one")


def random_backbone(depth, stages=4, seed=0):
    """The same network as it is before any training, in eval mode."""
    paddle.seed(seed)
    backbone = ResNet(depth, stages=stages)
    backbone.eval()
    return backbone


# --- pictures --------------------------------------------------------------------------------------------------------


def batches(pictures, groups, view):
    """uint8 [b, h, w, 3] for each group of indices: view(picture, index) of these pictures, decoded by threads one group ahead.

    Raises UserError for a picture that cannot be decoded: leaving it out would be a score of other data.
    """
    def one(index):
        try:
            return view(pictures.picture(index), index)
        except UndecodableError as error:
            raise UserError(f"{error}; a probe needs every picture that it is given: mend it, or take it out") from None

    with ThreadPoolExecutor(device.threads()) as pool:
        waiting = deque()
        try:
            for group in groups:
                waiting.append([pool.submit(one, int(index)) for index in group])
                if len(waiting) > 1:
                    yield np.stack([job.result() for job in waiting.popleft()])
            while waiting:
                yield np.stack([job.result() for job in waiting.popleft()])
        finally:
            for job in (job for group in waiting for job in group):
                job.cancel()


def in_order(count, batch_size=64):
    """All of `count` pictures in their order, in groups for `batches`."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


# --- features on disk -------------------------------------------------------------------------------------------------


@paddle.no_grad()
def features(backbone, views, stage=None, pooling="mean"):
    """uint8 [n, h, w, 3] → float32 of one stage (1 to 4; None for the last): pooling mean [n, C], map [n, C, h', w']."""
    x = normalise(paddle.to_tensor(views))
    found = backbone(x) if stage is None else backbone.stages(x)[stage - 1]
    return (found.mean([2, 3]) if pooling == "mean" else found).numpy()


def pooled(backbone, pictures, size):
    """Of pictures in memory, each squeezed to `size`: float32 [n, C]."""
    return np.concatenate([features(backbone, np.stack([whole(pictures[i], size) for i in group]))
                           for group in in_order(len(pictures))])


def digest(backbone):
    """sha256 of a backbone's names and numbers: the same for a checkpoint and for what was extracted from it."""
    sha256 = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        value = value.numpy()
        sha256.update(f"{name} {value.dtype} {value.shape} ".encode())
        sha256.update(np.ascontiguousarray(value))
    return sha256.hexdigest()


def extract(backbone, pictures, size, folder, stage=None, pooling="mean", view=centre):
    """Features of all pictures in their order: (memory map as from `features`, how many were computed now: all or 0).

    Args:
        pictures: a source with a `fingerprint` that changes when a picture does, see `labelled.Labelled`.
        size: (height, width) of the view.
        folder: of the cache; made where it does not exist.
        view: `centre` or `whole`.

    Raises UserError where a picture or the disk fails, or another process is writing the same file.
    """
    stage = stage or len(backbone.feat_channels)
    if not 1 <= stage <= len(backbone.feat_channels):
        raise UserError(f"--stage {stage}: this backbone has the stages 1 to {len(backbone.feat_channels)}")
    key = {"format": _FORMAT, "weights": digest(backbone), "pictures": pictures.fingerprint(), "view": view.__name__,
           "size": list(size), "stage": stage, "pooling": pooling, "paddle": paddle.__version__, "device": paddle.get_device()}
    key["device"] = key["device"].partition(":")[0]  # each rank has another GPU
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.npy"
    with _on_all_ranks(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
    there = bool(parallel.gather(paddle.to_tensor([[float(there)]])).numpy()[0, 0])  # as rank 0 sees it
    if not there:
        groups = in_order(len(pictures))
        mine = groups[parallel.rank()::parallel.world_size()]
        parts = (features(backbone, views, stage, pooling) for views in batches(
            pictures, mine, lambda picture, _: view(picture, size)))
        _write(path, len(pictures), -(-len(groups) // parallel.world_size()), zip((group[0] for group in mine), parts))
    with _on_all_ranks(path):
        found = _read(path)
    return found, 0 if there else len(pictures)


@contextlib.contextmanager
def _on_all_ranks(path):
    """What fails in here on one rank is a UserError on all. None is more than one block ahead of the others."""
    with parallel.together(lambda: {"file of features": path.name}):
        try:
            yield
        except BlockingIOError:
            raise UserError(f"{path}: another process is extracting these features; wait for it, or give another --cache") from None
        except OSError as refusal:
            raise UserError(f"{path}: {refusal.strerror or refusal}; the features of a probe are kept there: give another --cache, "
                            "with space, and one that all machines see where several share the work") from refusal


def _read(path):
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        raise UserError(f"{path}: damaged; delete it, and the features are computed again") from None


def _write(path, count, rounds, parts):
    """Writes `count` rows as one .npy, float32: in each of `rounds` a rank's next of `parts`, (number of its first row, rows
    [b, …]), where it has one left. An interrupted run leaves only the .part, which the next one writes anew: written, not
    mapped, so that a full disk is an error and not a signal."""
    part = path.with_suffix(".part")
    with contextlib.ExitStack() as stack:
        with _on_all_ranks(path):
            if parallel.is_main():
                lock = stack.enter_context(open(part, "ab"))
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not part.exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(part)):
                    raise BlockingIOError  # somebody finished and renamed it between the opening and the lock
                lock.truncate(0)
        with _on_all_ranks(path):
            file = os.open(part, os.O_WRONLY)
            stack.callback(os.close, file)
        for _ in range(rounds):
            with _on_all_ranks(path):
                for first, rows in itertools.islice(parts, 1):
                    head = io.BytesIO()
                    np.lib.format.write_array_header_1_0(
                        head, {"descr": "<f4", "fortran_order": False, "shape": (count, *rows.shape[1:])})
                    if first == 0:
                        _put(file, head.getvalue(), 0)
                    _put(file, np.ascontiguousarray(rows, "<f4").tobytes(), head.tell() + first * rows[0].size * 4)
        with _on_all_ranks(path):
            os.fsync(file)
        with _on_all_ranks(path):
            if parallel.is_main():
                os.replace(part, path)  # while it is locked


def _put(file, data, place):
    data = memoryview(data)
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written
