"""Which pictures, and which places in them, look like this one? What a backbone without any labels can be asked.

An index is a folder: the backbone's weights, its pooled features and feature maps of all pictures (each squeezed into one view),
and index.json, which says of which pictures, of what size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ppdensecl.data.sources import FolderSource
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features, knn
from ppdensecl.evaluation.labelled import Labelled

WEIGHTS, DESCRIPTION = "backbone.pdparams", "index.json"


def build(folder, pictures, backbone, size, stage=None):
    """Makes the index `folder` of the pictures below a folder. size: (height, width) of the view. Returns their number."""
    names = FolderSource(pictures).names
    found = Labelled(os.path.abspath(pictures), [names[i] for i in range(len(names))], np.zeros(len(names), np.int64))
    stage = stage or len(backbone.feat_channels)
    _extracted(folder, found, backbone, size, stage)
    try:
        checkpoint.write_arrays(Path(folder) / WEIGHTS, {name: value.numpy() for name, value in backbone.state_dict().items()})
        temporary = Path(folder) / f".{DESCRIPTION}.tmp{os.getpid()}"
        temporary.write_text(json.dumps({"root": str(found.root), "size": list(size), "stage": stage,
                                         "pictures": [os.fsdecode(names[i]) for i in range(len(names))]}, indent=0))
        os.replace(temporary, Path(folder) / DESCRIPTION)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return len(found)


def _extracted(folder, pictures, backbone, size, stage):
    return [features.extract(backbone, pictures, size, folder, stage, pooling, features.whole)[0] for pooling in ("mean", "map")]


class Index:
    """An index that `build` has made. Raises UserError where it is not whole; pictures that have changed are computed again."""

    def __init__(self, folder):
        try:
            found = json.loads((Path(folder) / DESCRIPTION).read_text())
            self.size, self.stage = tuple(found["size"]), found["stage"]
            self.pictures = Labelled(found["root"], [os.fsencode(name) for name in found["pictures"]],
                                     np.zeros(len(found["pictures"]), np.int64))
        except OSError as error:
            raise UserError(f"{folder}: holds no index ({DESCRIPTION}: {error.strerror}); make it with --pictures and "
                            "--checkpoint") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder}/{DESCRIPTION}: is damaged; make the index again with --pictures and --checkpoint") from None
        self.backbone = features.load_backbone(Path(folder) / WEIGHTS)
        self.pooled, self.maps = _extracted(folder, self.pictures, self.backbone, self.size, self.stage)
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
