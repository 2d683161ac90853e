"""Which pictures, and which places in them, look like this one? What a backbone without any labels can be asked.

An index is a folder: the backbone's weights, its pooled features and feature maps of all pictures (each squeezed into one view),
and index.json, which says of which pictures, and of what size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.sources import FolderSource
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features, knn
from ppdensecl.evaluation.labelled import Labelled

WEIGHTS, DESCRIPTION = "backbone.pdparams", "index.json"


def build(folder, pictures, backbone, size, stage=None):
    """Makes the index `folder` of the pictures below a folder, in place of an earlier one. size: (height, width) of the view.

    Returns (number of pictures, the UndecodableErrors of those that were left out). Raises UserError.
    """
    names, kept, bad = FolderSource(pictures).names, [], []
    found = _pictures(pictures, [names[i] for i in range(len(names))])
    for i in range(len(found)):
        try:
            found.picture(i)
            kept.append(i)
        except UndecodableError as error:
            bad.append(error)
    if not kept:
        raise UserError(f"--pictures: none of the {len(bad)} pictures of {pictures} can be read ({bad[0]})")
    found = found.only(kept)
    stage = stage or len(backbone.feat_channels)
    try:
        files = [features.extract(backbone, found, size, folder, stage, pooling, features.whole)[0].filename
                 for pooling in ("mean", "map")]
        checkpoint.write_arrays(Path(folder) / WEIGHTS, {name: value.numpy() for name, value in backbone.state_dict().items()})
        checkpoint.write_text(Path(folder) / DESCRIPTION, json.dumps({
            "root": str(found.root), "size": list(size), "stage": stage, "files": [Path(file).name for file in files],
            "fingerprint": found.fingerprint(), "pictures": [os.fsdecode(found.names[i]) for i in range(len(found))]}, indent=0))
        for old in Path(folder).glob("*.npy"):  # of an earlier index
            if str(old) not in map(str, files):
                old.unlink()
    except UserError as error:
        raise UserError(str(error).replace("another --cache", "another INDEX_DIR")) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return len(found), bad


def _pictures(root, names):
    return Labelled(os.path.abspath(root), names, np.zeros(len(names), np.int64))


class Index:
    """An index that `build` has made. Raises UserError where it is not whole, or its pictures are no longer what they were."""

    def __init__(self, folder):
        again = "make the index again with --pictures and --checkpoint"
        try:
            found = json.loads((Path(folder) / DESCRIPTION).read_text())
            self.size = tuple(map(int, found["size"]))
            self.stage = int(found["stage"])
            self.pictures = _pictures(found["root"], [os.fsencode(name) for name in found["pictures"]])
            self.pooled, self.maps = (np.load(Path(folder) / Path(name).name, mmap_mode="r") for name in found["files"])
            whole = len(self.pooled) == len(self.maps) == len(self.pictures) and len(self.size) == 2
        except OSError as error:
            raise UserError(f"{folder}: holds no whole index ({error.filename}: {error.strerror}); {again}") from None
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{folder}/{DESCRIPTION}: is damaged, or its files are; {again}")
        if self.pictures.fingerprint() != found["fingerprint"]:
            raise UserError(f"{found['root']}: pictures have changed since the index {folder} was made; {again}")
        self.backbone = features.load_backbone(Path(folder) / WEIGHTS)
        # Features behind a ReLU are all alike, until what all pictures share is taken off.
        self._mean = self.pooled.mean(0)

    def like_picture(self, picture, count):
        """[(index, cosine)] of the `count` most similar pictures. picture: uint8 [H, W, 3]."""
        queried = features.features(self.backbone, features.whole(picture, self.size)[None], self.stage)
        similarity, found = knn.neighbours(self.pooled - self._mean, queried - self._mean, count)
        return list(zip(found[0].tolist(), similarity[0].tolist()))

    def cell_of(self, picture, place):
        """The (row, column) of the feature map that (x, y) in pixels of the picture lies in. Raises UserError outside."""
        (x, y), (height, width) = place, picture.shape[:2]
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"--at {x} {y}: lies outside of the picture, which has {width} × {height} pixels")
        return y * self.maps.shape[2] // height, x * self.maps.shape[3] // width

    def like_place(self, picture, cell, count):
        """[(index, (row, column), cosine)] of the most similar cells, at most one of each picture."""
        row, column = cell
        queried = features.features(self.backbone, features.whole(picture, self.size)[None], self.stage, "map")
        wanted, similarity, where = knn.unit(queried[:, :, row, column] - self._mean)[0], [], []
        for start in range(0, len(self.maps), 256):
            part = self.maps[start : start + 256]
            cells = np.moveaxis(part.reshape(*part.shape[:2], -1), 1, 2) - self._mean  # [n, h·w, C]
            cosine = cells @ wanted / np.maximum(np.linalg.norm(cells, axis=2), 1e-12)
            where.append(cosine.argmax(1))
            similarity.append(cosine.max(1))
        similarity, where = np.concatenate(similarity), np.concatenate(where)
        order = np.argsort(-similarity, kind="stable")[:count]
        return [(int(i), divmod(int(where[i]), self.maps.shape[3]), float(similarity[i])) for i in order]
