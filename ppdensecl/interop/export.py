"""A backbone as a static graph for Paddle Inference and ONNX.

The network takes pictures that are float32 [N, 3, H, W] and normalised already, of any N, H and W, as exported classifiers do:
every server and runtime knows that form, and whoever has normalised pictures loses nothing. How to get them from a
picture file stands in inference.yml.

Nothing is there under its name before what will run it has given the numbers of the network in training, at several sizes.
"""

from __future__ import annotations

import inspect
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import paddle
import yaml
from paddle import nn

from ppdensecl import __version__
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.inference import engines, exported
from ppdensecl.interop import layouts
from ppdensecl.interop.foreign import read
from ppdensecl.models import ResNet
from ppdensecl.models.densecl import MEAN, STD

SIZES = (64, 96), (97, 65)  # on which outputs are compared: even and odd, wide and high
BATCHES = 1, 3
TOLERANCE = 1e-5  # of an output's largest value
_OPSET = 13


class Network(nn.Layer):
    """images [N, 3, H, W] → the maps of `stages` (ascending, from 1) [N, C, h, w], and the mean of the last of them [N, C]."""

    def __init__(self, backbone, stages):
        super().__init__()
        self.backbone = backbone
        self.numbers = stages
        self.maps = [f"stage{number}" for number in stages]
        self.outputs = (*self.maps, "pooled")
        self.eval()

    def forward(self, images):
        maps = self.backbone.stages(images)
        return (*(maps[number - 1] for number in self.numbers), maps[self.numbers[-1] - 1].mean([2, 3]))


class Comparison:
    """Holds the outputs of an exported network against the training-side model of a checkpoint (whosever it is).

    `worst` is the largest difference so far, as a part of the largest value of its output. Raises UserError beyond `tolerance`.
    """

    def __init__(self, source, outputs, tolerance):
        found, backbone = _backbone(source)
        stages = [_number(name) for name in outputs if name != "pooled"]
        if stages[-1] > found.stages:
            raise UserError(f"{found.file}: has no stage {stages[-1]}, which the export has; give the one that was exported")
        self._network, self._file, self._tolerance, self.worst = Network(backbone, stages), found.file, tolerance, 0.0

    def add(self, images, outputs):
        self.worst = max(self.worst, difference(self._network, images, outputs))
        if not self.worst <= self._tolerance:
            raise UserError(f"{self._file}: the training-side model's outputs differ by {self.worst:.1e} of the largest value, "
                            f"at most {self._tolerance} is right; give the checkpoint that was exported")


@paddle.no_grad()
def difference(network, images, outputs):
    """The largest difference between {name: array} and what `network` gives, in parts of the output's largest value."""
    worst = 0.0
    for name, right in zip(network.outputs, network(paddle.to_tensor(images))):
        right = right.numpy()
        if outputs[name].shape != right.shape:
            raise UserError(f"the exported network gives {name} as {list(outputs[name].shape)}, expected {list(right.shape)}")
        worst = np.maximum(worst, np.abs(outputs[name] - right).max() / max(np.abs(right).max(), 1e-30))  # of NaN and 1, NaN
    return float(worst)


def _backbone(source):
    found = read(source, backbone=True)
    odd = [name for name, array in found.arrays.items() if not np.isfinite(array).all()]
    if odd:
        raise UserError(f"{found.file}: not all numbers are finite in {layouts.listed(odd)}; give another checkpoint")
    backbone = ResNet(found.depth, stages=found.stages)
    checkpoint.set_weights(backbone, found.arrays, found.file)
    backbone.eval()
    return found, backbone


def export(source, config, folder, stages=None, view="centre", onnx=False):
    """Writes the backbone of a checkpoint, whosever it is, into `folder`, in place of an earlier export. Returns sentences.

    Args:
        config: of the training; its picture size is the view's.
        stages: numbers of the maps that are wanted (None: the last).
        view: centre or whole, how pictures of other shapes become views.

    Raises UserError, and leaves what was there, where anything fails or the outputs are not those of the model.
    """
    found, backbone = _backbone(source)
    if (config.model.backbone, config.model.stages) != (f"resnet{found.depth}", found.stages):
        raise UserError(f"{found.file}: holds a resnet{found.depth} with {found.stages} stages, but the config says "
                        f"{config.model.backbone} with {config.model.stages}; give the config of its run, or -o model.backbone="
                        f"resnet{found.depth} model.stages={found.stages}")
    stages = sorted(set(stages or [found.stages]))
    if not 1 <= stages[0] <= stages[-1] <= found.stages:
        raise UserError(f"--stages {' '.join(map(str, stages))}: this backbone has the stages 1 to {found.stages}")
    network, folder = Network(backbone, stages), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export", dir=folder) as temporary:
            temporary = Path(temporary)
            _save(network, temporary)
            if onnx:
                _to_onnx(temporary, network)
            description = _description(found, config, network, view, temporary)
            _write_description(temporary, description)
            checked = {"Paddle Inference": engines.PaddleEngine}
            if onnx:
                checked["onnxruntime"] = engines.OnnxEngine
            worst = {name: _check(network, engine(exported.read(temporary))) for name, engine in checked.items()}
            description["checked"] = {"pictures": [list(size) for size in SIZES], "batches": list(BATCHES),
                                      "largest_difference": worst}
            _write_description(temporary, description)
            _replace(temporary, folder)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror})") from None
    return [found.description(), *found.notes] + [
        f"written: {folder}: {', '.join((*description['files'], exported.DESCRIPTION))}; outputs {', '.join(network.outputs)}; "
        + ", ".join(f"{name}'s are the model's to {value:.0e} of the largest value" for name, value in worst.items())]


def _save(network, folder):
    spec = paddle.static.InputSpec([None, 3, None, None], "float32", "image")
    traced = Network(network.backbone, network.numbers)  # to_static changes what it is given; `network` stays as in training
    paddle.jit.save(paddle.jit.to_static(traced, input_spec=[spec], full_graph=True), str(folder / "inference"))
    for path in folder.iterdir():
        if path.name not in exported.FILES:  # names of variables, which nothing reads
            path.unlink()


def _to_onnx(folder, network):
    try:
        import onnx
        import paddle2onnx
    except (ImportError, ValueError) as error:  # ValueError: of paddle2onnx 2 under paddlepaddle 2
        advice = "paddle2onnx==1.3.1" if paddle.__version__.startswith("2.") else "paddle2onnx onnx onnxruntime"
        raise UserError(f"--onnx: paddle2onnx cannot be used with paddlepaddle {paddle.__version__} ({str(error).split('. ')[0]})"
                        f"; `pip install {advice}`") from None
    # Its own optimisers install packages at run time, or fail; onnxruntime optimises by itself.
    plain = {"optimize_tool": "None"} if "optimize_tool" in inspect.signature(paddle2onnx.export).parameters else {}
    path = folder / exported.ONNX
    paddle_file = next(folder / name for name in exported.PADDLE_NETWORKS if (folder / name).exists())
    paddle2onnx.export(str(paddle_file), str(folder / exported.PADDLE_WEIGHTS), save_file=str(path), opset_version=_OPSET,
                       **plain)
    if not path.is_file():
        raise UserError("--onnx: paddle2onnx could not convert this network; its own words are above")
    model = onnx.load(str(path))
    _rename(model.graph, {output.name: name for output, name in zip(model.graph.output, network.outputs)})
    for value in (*model.graph.input, *model.graph.output):
        stride = f"/{_stride(value.name)}" if value.name in network.maps else ""
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if axis != 1:
                dimension.dim_param = "N" if axis == 0 else f"{'HW'[axis - 2]}{stride}"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _number(name):
    return int(name[len("stage"):])


def _stride(name):
    return 4 << (_number(name) - 1)


def _rename(graph, names):
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in graph.output:
        value.name = names[value.name]


def _description(found, config, network, view, folder):
    size = config.data.size
    widths = network.backbone.feat_channels
    return {
        "format": exported.FORMAT,
        "made_by": f"ppdensecl {__version__}, paddlepaddle {paddle.__version__}",
        "model": {"backbone": f"resnet{found.depth}", "stages": found.stages},
        "input": {"name": "image", "dtype": "float32", "shape": [-1, 3, -1, -1], "layout": "NCHW", "colours": "RGB",
                  "normalised": "before it goes in, as `preprocess` says"},
        "preprocess": {"view": view, "size": list(size),
                       "resize": f"bilinear, antialiased, shape kept, to cover {list(exported.covering(size))}; then the centre "
                                 "is cut out" if view == "centre" else "bilinear, antialiased, to `size`",
                       "normalise": "(value / 255 - mean) / std", "mean": list(MEAN), "std": list(STD)},
        "outputs": [{"name": name, "dtype": "float32", "shape": [-1, widths[_number(name) - 1], -1, -1], "stride": _stride(name)}
                    for name in network.maps] + [{"name": "pooled", "dtype": "float32",
                                                  "shape": [-1, widths[_number(network.maps[-1]) - 1]],
                                                  "mean_of": network.maps[-1]}],
        "files": {path.name: exported.sha256_of(path) for path in sorted(folder.iterdir()) if path.name != exported.DESCRIPTION},
        "checkpoint": {"file": found.file, "sha256": exported.sha256_of(found.file), "epoch": found.epoch,
                       "iteration": found.iteration},
        "config": config.model_dump(),
    }


def _write_description(folder, description):
    (folder / exported.DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _check(network, engine):
    generator, worst = np.random.default_rng(0), 0.0
    for batch, size in itertools.product(BATCHES, SIZES):
        images = generator.standard_normal((batch, 3, *size), dtype=np.float32)
        worst = np.maximum(worst, difference(network, images, engine.run(images)))
    if not worst <= TOLERANCE:
        raise UserError(f"{engine.title}: outputs differ from the model's by {worst:.1e} of the largest value; at most "
                        f"{TOLERANCE} is right")
    return float(worst)


def _replace(new, folder):
    """Moves an export into its folder, the description last; one without the files that belong to it is refused when read."""
    (folder / exported.DESCRIPTION).unlink(missing_ok=True)
    for name in exported.FILES:
        if (new / name).exists():
            os.replace(new / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
