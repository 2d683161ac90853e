"""An exported model as a folder: the files of the network, and inference.yml, which says what goes in and comes out.

Nothing in this package needs paddle until an engine is made of it: it runs where only onnxruntime is installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np
import yaml

from ppdensecl.data.source import sha256_of
from ppdensecl.data.transforms import resize
from ppdensecl.errors import UserError

DESCRIPTION = "inference.yml"
FORMAT = 1
PADDLE_NETWORKS = ("inference.json", "inference.pdmodel")  # as Paddle 3 and Paddle 2 write them
PADDLE_WEIGHTS = "inference.pdiparams"
ONNX = "inference.onnx"
FILES = (*PADDLE_NETWORKS, PADDLE_WEIGHTS, ONNX, DESCRIPTION)
VIEWS = ("centre", "whole")


class Exported(NamedTuple):
    folder: Path
    files: dict  # {name: sha256}
    title: str  # e.g. "resnet50, 4 stages"
    input_name: str
    view: str  # one of VIEWS
    size: Tuple[int, int]  # height, width of the view in pixels
    mean: Tuple[float, ...]  # of a channel, 0 to 1
    std: Tuple[float, ...]
    outputs: Tuple[str, ...]  # names in the order of the network's outputs: stage maps [N, C, h, w], then "pooled" [N, C]

    @property
    def maps(self):
        """The names of the stage maps; the last is the deepest."""
        return [name for name in self.outputs if name != "pooled"]

    def file(self, names):
        """The path of the first of `names` that the export wrote. Raises UserError where there is none, or another one now."""
        for name in names:
            if name in self.files:
                break
        else:
            raise UserError(f"{self.folder}: the export holds no {' or '.join(names)}, but {', '.join(self.files)}"
                            + ("; export it with --onnx" if ONNX in names else ""))
        path = self.folder / name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); export the model again") from None
        if found != self.files[name]:
            raise UserError(f"{path}: is not the file that {DESCRIPTION} was written with (its checksum is wrong); export the "
                            "model again")
        return path

    def seen(self, picture):
        """uint8 [H, W, 3] RGB of any size → the view that goes in, uint8 [*size, 3]."""
        return (centre if self.view == "centre" else whole)(picture, self.size)

    def normalised(self, views):
        """uint8 [n, h, w, 3] → float32 [n, 3, h, w], mean 0 and deviation 1 over ImageNet: the network's input."""
        views = np.asarray(views)
        x = np.empty((len(views), 3, *views.shape[1:3]), np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            np.subtract(views[..., channel], np.float32(255.0 * mean), out=x[:, channel], dtype=np.float32)
            x[:, channel] *= np.float32(1.0 / (255.0 * std))
        return x


def centre(picture, size):
    """The usual test view, as in the probes: the short side to 8/7 of the view (256 for 224), antialiased, the middle cut out."""
    scale = max(covered / extent for covered, extent in zip(covering(size), picture.shape))
    picture = resize(picture, tuple(max(side, round(scale * extent)) for side, extent in zip(size, picture.shape)))
    top, left = ((extent - side) // 2 for side, extent in zip(size, picture.shape))
    return np.ascontiguousarray(picture[top : top + size[0], left : left + size[1]])


def covering(size):
    """The (height, width) that a picture is made to cover before its centre of `size` is cut out."""
    return tuple(round(8 / 7 * side) for side in size)


def whole(picture, size):
    """All of the picture, squeezed into the view."""
    return resize(picture, size)


def read(folder):
    """The export in a folder. Raises UserError."""
    path = Path(folder) / DESCRIPTION
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UserError(f"{path}: has format {found['format']}, expected {FORMAT}; export the model again with this version")
        view = found["preprocess"]
        exported = Exported(
            Path(folder), _checked(found["files"], dict), f"{found['model']['backbone']}, {found['model']['stages']} stages",
            _checked(found["input"]["name"], str), _checked(view["view"], str), _checked(tuple(view["size"]), tuple),
            tuple(map(float, view["mean"])), tuple(map(float, view["std"])),
            tuple(_checked(output["name"], str) for output in found["outputs"]))
        right = (len(exported.mean) == len(exported.std) == 3 and all(std > 0 for std in exported.std) and exported.view in VIEWS
                 and len(exported.size) == 2 and all(type(side) is int and 1 <= side <= 65536 for side in exported.size)
                 and exported.maps and "pooled" in exported.outputs and set(exported.files) <= set(FILES)
                 and all(re.fullmatch("stage[1-4]|pooled", name) for name in exported.outputs)
                 and len(set(exported.outputs)) == len(exported.outputs))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a folder that tools/export_model.py wrote"
                        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        right = False
    if not right:
        raise UserError(f"{path}: is not as tools/export_model.py writes it; export the model again")
    return exported


def _checked(value, kind):
    if not isinstance(value, kind):
        raise TypeError(value)
    return value
