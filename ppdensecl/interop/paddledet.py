"""What PaddleDetection lacks for fine-tuning a standard ResNet as the paper's transfers did. Importing this registers it.

| registered | |
|---|---|
| Res5HeadExtraNorm | the RoI head of a C4 network: res5, trained, and a BatchNorm after it |
| MaskFeatNorm | four 3×3 convolutions with BatchNorm and the upsampling; PaddleDetection's own takes no BatchNorm |
| !IterationSteps | a learning rate whose steps are counted in iterations, as the paper does; PaddleDetection counts epochs |

Pretrained weights are loaded by PaddleDetection's `load_pretrain_weight`, which matches names by their ends and only
notes where a tensor finds no place; here it is a UserError. Its ResNet of `variant: b` is torchvision's; variant a has
the same names and shapes but other features, c and d have another stem.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import paddle
import ppdet
import ppdet.engine
import yaml
from paddle import nn
from paddle.regularizer import L2Decay
from ppdet.core.workspace import load_config, merge_config, register, serializable
from ppdet.modeling import ops
from ppdet.modeling.backbones.name_adapter import NameAdapter
from ppdet.modeling.backbones.resnet import BasicBlock, Blocks, BottleNeck
from ppdet.modeling.backbones.resnet import ResNet as TheirResNet
from ppdet.modeling.heads.mask_head import MaskFeat
from ppdet.modeling.proposal_generator.rpn_head import RPNHead
from ppdet.modeling.shape_spec import ShapeSpec
from ppdet.utils import checkpoint as their_checkpoint
from ppdet.utils.logger import setup_logger

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features
from ppdensecl.interop.layouts import listed
from ppdensecl.models import ResNet
from ppdensecl.models.resnet import BLOCKS

LOGGER = setup_logger("ppdet.ppdensecl")
SHORT = "res2.res2a.short"  # a 1×1 convolution that PaddleDetection's ResNet-18 and 34 have and torchvision's have not
TOLERANCE = 1e-5  # of the largest value of a feature map


# Names.

def names(depth, stages=4):
    """{our name: PaddleDetection's name} of all tensors of the ResNet; 265 for depth 50 with all stages."""
    found = {"conv1.weight": "conv1.conv1.conv.weight", **_norm("bn1", "conv1.conv1")}
    for stage, blocks in enumerate(BLOCKS[depth][:stages], 1):
        group = f"res{stage + 1}"
        for number in range(blocks):
            ours, theirs = f"layer{stage}.{number}", f"{group}.{_block(group, blocks, number)}"
            for letter, part in zip("abc" if depth >= 50 else "ab", "123"):
                found[f"{ours}.conv{part}.weight"] = f"{theirs}.branch2{letter}.conv.weight"
                found.update(_norm(f"{ours}.bn{part}", f"{theirs}.branch2{letter}"))
            if number == 0 and (stage > 1 or depth >= 50):
                found[f"{ours}.downsample.0.weight"] = f"{theirs}.short.conv.weight"
                found.update(_norm(f"{ours}.downsample.1", f"{theirs}.short"))
    return found


def _norm(ours, theirs):
    return {f"{ours}.{leaf}": f"{theirs}.norm.{leaf}" for leaf in ("weight", "bias", "_mean", "_variance")}


def _block(group, blocks, number):
    if group == "res4" and blocks > 10:  # letters run out: a, b1, b2, …
        return group + ("a" if number == 0 else f"b{number}")
    return group + "abcdefghijk"[number]


def export(arrays, depth):
    """{our name: array} of a whole ResNet → {PaddleDetection's name: array}.

    ResNet-18 and 34 get SHORT as the identity that torchvision has there: exactly so with the running statistics, while
    in training its BatchNorm normalises what it passes on.
    """
    found = {theirs: arrays[ours] for ours, theirs in names(depth).items()}
    if depth < 50:
        found[f"{SHORT}.conv.weight"] = (np.eye(64, dtype=np.float32) * np.float32(math.sqrt(1 + 1e-5)))[:, :, None, None]
        for leaf, value in (("weight", 1), ("bias", 0), ("_mean", 0), ("_variance", 1)):
            found[f"{SHORT}.norm.{leaf}"] = np.full(64, value, np.float32)
    return found


# Loading, and the proof of it.

def load(model, path):
    """Lets PaddleDetection load the backbone `path` into `model`; returns (tensors loaded, tensors that a backbone has).

    Both are the same number: raises UserError unless every tensor of the file found its place and every tensor of the
    model's ResNet (res5 in a C4 network's RoI head too) was set.
    """
    if not os.path.isfile(path) or not str(path).endswith(".pdparams"):
        raise UserError(f"{path}: no such .pdparams file; write one with tools/export_finetune.py CHECKPOINT --to paddledet "
                        "--out det.pdparams")
    _check_variant(model)
    arrays = checkpoint.read_arrays(path)
    wanted = {name for name in model.state_dict() if _is_backbone(name, model)}
    matched = {}
    for name in wanted:  # the longest end of the name that the file has, as PaddleDetection matches
        ends = [name[match.end():] for match in re.finditer(r"^|\.", name)]
        matched[name] = next((end for end in ends if end in arrays), None)
    state = model.state_dict()
    fits = {name for name, end in matched.items() if end is not None and list(arrays[end].shape) == list(state[name].shape)
            and arrays[end].dtype == np.float32}
    left_over = arrays.keys() - {matched[name] for name in fits}
    if fits == wanted and not left_over:
        their_checkpoint.load_pretrain_weight(model, str(path))
        state = model.state_dict()
        fits = {name for name in wanted if np.array_equal(state[name].numpy(), arrays[matched[name]])}
    if fits != wanted or left_over:
        raise UserError(f"{path}: {len(fits)} of the {len(wanted)} tensors of the model's backbone would be loaded, and "
                        f"{len(left_over)} of the file's have no place; such as {listed(sorted((wanted - fits) | left_over))}; "
                        "it belongs to another depth, or was not written by tools/export_finetune.py --to paddledet")
    return len(fits), len(wanted)


def _is_backbone(name, model):
    return isinstance(model, TheirResNet) or name.startswith("backbone.") or ".res5." in name


def _check_variant(model):
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, TheirResNet) and layer.variant != "b":
            raise UserError(f"the config's ResNet is of variant {layer.variant}, which has other features; use ResNet.variant=b")


@paddle.no_grad()
def check(path, arrays):
    """Proves that a file gives PaddleDetection the features of our ResNet with `arrays`, {our name: array}.

    Its own ResNet loads the file in its own way; all tensors must be taken, and the four feature maps agree in eval
    mode. Returns (number of tensors, largest difference relative to the largest value of a map). Raises UserError.
    """
    depth, stages = features.architecture(arrays, path)
    theirs = TheirResNet(depth=depth, variant="b", freeze_at=-1, freeze_norm=False, num_stages=stages,
                         return_idx=list(range(stages)))
    count, _ = load(theirs, path)
    ours = ResNet(depth, stages=stages)
    checkpoint.set_weights(ours, arrays, path)
    ours.eval()
    theirs.eval()
    generator, worst = np.random.default_rng(0), 0.0
    for size in ((64, 96), (97, 65)):  # even and odd, wide and high
        x = paddle.to_tensor(generator.standard_normal((1, 3, *size), dtype=np.float32))
        for a, b in zip(ours.stages(x), theirs({"image": x})):
            a, b = a.numpy(), b.numpy()
            if a.shape != b.shape:
                raise UserError(f"{path}: gives PaddleDetection maps of shape {list(b.shape)}, expected {list(a.shape)}")
            worst = np.maximum(worst, np.abs(a - b).max() / np.abs(a).max())  # of NaN and a number, NaN
    if not worst < TOLERANCE:
        raise UserError(f"{path}: gives PaddleDetection other feature maps, by {worst:.1e} of the largest value; expected less "
                        f"than {TOLERANCE}")
    return count, float(worst)


# Registered for the configs.

def _batch_norm(channels):
    free = paddle.ParamAttr(regularizer=L2Decay(0.0))  # no weight decay on a norm, as everywhere in these recipes
    return nn.BatchNorm2D(channels, weight_attr=free, bias_attr=free)


@register
class Res5HeadExtraNorm(nn.Layer):
    """x [R, 1024, 14, 14] (256 channels below depth 50) → [R, 2048, 7, 7] (512): res5, nothing frozen, and a BatchNorm.

    Source: MoCo's detection/train_net.py, Res5ROIHeadsExtraNorm. A SyncBN top level makes all of these synchronous.
    """

    def __init__(self, depth=50):
        super().__init__()
        self.variant = "b"
        block = BottleNeck if depth >= 50 else BasicBlock
        self.res5 = Blocks(block, 256 * block.expansion, 512, count=BLOCKS[depth][3], name_adapter=NameAdapter(self),
                           stage_num=5, variant="b", freeze_norm=False)
        self.channels = 512 * block.expansion
        self.norm = _batch_norm(self.channels)

    @property
    def out_shape(self):
        return [ShapeSpec(channels=self.channels, stride=16)]

    def forward(self, x, stage=0):
        return self.norm(self.res5(x))


@register
class MaskFeatNorm(MaskFeat):
    """x [R, C, 14, 14] → [R, out_channel, 28, 28]: `num_convs` 3×3 convolutions, with BatchNorm and ReLU, then as theirs."""

    def __init__(self, in_channel=256, out_channel=256, num_convs=4):
        super().__init__(in_channel, out_channel, num_convs=num_convs)
        layers = []
        for name, layer in self.upsample.named_children():
            if isinstance(layer, nn.Conv2D):
                conv = nn.Conv2D(layer._in_channels, out_channel, 3, padding=1, bias_attr=False,
                                 weight_attr=nn.initializer.KaimingNormal(fan_in=out_channel * 9))
                layers += [(name, nn.Sequential(conv, _batch_norm(out_channel)))]
            else:
                layers += [(name, layer)]
        self.upsample = nn.Sequential(*layers)


@serializable
class IterationSteps:
    """A linear warm-up of `warmup` iterations from `start_factor`, then × 0.1 at each of `milestones`, all in iterations."""

    use_warmup = False  # theirs, which would come before this

    def __init__(self, milestones, warmup=100, start_factor=0.001):
        self.milestones, self.warmup, self.start_factor = milestones, warmup, start_factor

    def __call__(self, base_lr, step_per_epoch=None):
        boundaries = [step - self.warmup for step in self.milestones]  # Paddle counts from the end of the warm-up
        decay = paddle.optimizer.lr.PiecewiseDecay(boundaries, [base_lr * 0.1**n for n in range(len(boundaries) + 1)])
        return paddle.optimizer.lr.LinearWarmup(decay, self.warmup, self.start_factor * base_lr, base_lr)


# Repairs of PaddleDetection 2.6.0. It was written for a Paddle in which a tensor always had a dimension.

def repair():
    """Replaces what fails in PaddleDetection 2.6.0, once, and says so; other versions stay as they are."""
    if ppdet.__version__ != "2.6.0":
        LOGGER.warning(f"PaddleDetection {ppdet.__version__}: ppdensecl knows 2.6.0, and repairs nothing here")
    elif not getattr(paddle.concat, "takes_0d", False):
        new = int(paddle.__version__.split(".")[0]) >= 3
        paddle.concat = _takes_0d(paddle.concat)
        RPNHead._gen_proposal = _gen_proposal
        if new:
            ops.multiclass_nms = _multiclass_nms
        LOGGER.info("PaddleDetection 2.6.0: ppdensecl lets paddle.concat take 0-d tensors, and RPNHead count in a 1-d one"
                    + (", and calls multiclass_nms as Paddle 3 has it" if new else ""))


def _takes_0d(concat):
    @functools.wraps(concat)  # without it to_static would look into this function, for ever
    def concat_0d(x, axis=0, name=None):
        return concat([item.reshape([1]) if item.ndim == 0 else item for item in x], axis, name)
    concat_0d.takes_0d = True
    return concat_0d


_their_gen_proposal = RPNHead._gen_proposal  # a name of the module: Paddle 2.6's to_static finds none of a closure


def _gen_proposal(self, scores, bbox_deltas, anchors, inputs):
    rois, count = _their_gen_proposal(self, scores, bbox_deltas, anchors, inputs)
    return rois, count.reshape([-1])


def _multiclass_nms(bboxes, scores, score_threshold, nms_top_k, keep_top_k, nms_threshold=0.3, normalized=True, nms_eta=1.0,
                    background_label=-1, return_index=False, return_rois_num=True, rois_num=None, name=None):
    found, index, count = paddle._C_ops.multiclass_nms3(
        bboxes, scores, rois_num, score_threshold, nms_top_k, keep_top_k, nms_threshold, normalized, nms_eta, background_label)
    return found, count if return_rois_num else None, index if return_index else None


@contextlib.contextmanager
def _full_graph():
    """Both Paddles would else trace in pieces, which have no program to save."""
    to_static = paddle.jit.to_static
    paddle.jit.to_static = functools.partial(to_static, full_graph=True)
    try:
        yield
    finally:
        paddle.jit.to_static = to_static


# What runs a config: train, evaluate and export through PaddleDetection's Trainer.

_REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError, yaml.YAMLError)


def start_ranks():
    """To be called before everything else where several processes share the work; alone it does nothing."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1:
        ppdet.engine.init_parallel_env()


def read_config(path, overrides=()):
    """PaddleDetection's config of a file, with KEY=VALUE strings (values as in YAML) on top. Raises UserError.

    PaddleDetection has one config in a process. Keys of this project beside its own: `iterations` (to train, in place of
    `epoch`) and `total_batch_size` (over all GPUs).
    """
    changes = {}
    try:
        for item in overrides:
            key, sign, value = item.partition("=")
            if not sign:
                raise UserError(f"-o {item}: expected KEY=VALUE, e.g. TrainReader.batch_size=2")
            *parents, last = key.strip().split(".")
            here = functools.reduce(lambda part, name: part.setdefault(name, {}), parents, changes)
            here[last] = yaml.load(value, Loader=yaml.Loader)  # as PaddleDetection reads its files
        load_config(str(path))
        config = merge_config(changes)
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: PaddleDetection refuses it: {reason}") from error
    ranks = paddle.distributed.get_world_size()
    if config.get("total_batch_size"):
        if config.total_batch_size % ranks:
            raise UserError(f"'total_batch_size' is {config.total_batch_size}, which {ranks} GPUs cannot share evenly")
        config.TrainReader["batch_size"] = config.total_batch_size // ranks
    folder = Path(config.save_dir) / config.filename  # where PaddleDetection writes its checkpoints
    config.output_eval, config.vdl_log_dir = str(folder), str(folder / "vdl")
    folder.mkdir(parents=True, exist_ok=True)
    config.use_gpu = paddle.get_device().startswith("gpu")
    return config


class Trainer(ppdet.engine.Trainer):
    """PaddleDetection's, which also keeps the last evaluation: `results` {"bbox": 12 numbers of COCO, "mask": …}."""

    results = {}

    def __init__(self, config, mode):
        repair()
        part = {"train": "TrainDataset", "eval": "EvalDataset"}.get(mode)
        for part in filter(None, (part, "EvalDataset" if mode == "train" and config.get("validate", True) else None)):
            section = config[part]
            for name in (section["image_dir"], section["anno_path"]):
                path = Path(section["dataset_dir"], name)
                if not path.exists():  # PaddleDetection would download some data set of that name
                    raise UserError(f"{path}: no such file or folder; set {part}.dataset_dir, image_dir and anno_path")
        super().__init__(config, mode)
        if mode == "train":
            if len(self.loader) == 0:
                raise UserError(f"the training data has {len(self.dataset)} pictures, fewer than one batch for each GPU; use a "
                                "smaller batch")
            if config.get("iterations"):
                self.cfg.epoch = self.end_epoch = math.ceil(config.iterations / len(self.loader))

    def _reset_metrics(self):
        found = {kind: list(numbers) for metric in self._metrics for kind, numbers in metric.get_results().items()}
        self.results = found or self.results
        super()._reset_metrics()

    def train(self, validate=False):
        if self.cfg.get("iterations"):
            self.loader = _Shortened(self.loader, self.cfg.iterations - self.start_epoch * len(self.loader))
        super().train(validate)


class _Shortened:
    """A loader that ends within an epoch: PaddleDetection knows whole epochs only."""

    def __init__(self, loader, left):
        self.loader, self.left, self.dataset = loader, left, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for data in itertools.islice(self.loader, self.left):
            self.left -= 1
            yield data


def train(config, resume=None):
    """Trains; returns the last evaluation's `results`. `resume` is a checkpoint without suffix. Raises UserError."""
    trainer = Trainer(config, "train")
    if resume is not None:
        _whole(trainer, resume)
        if trainer.start_epoch >= trainer.cfg.epoch:
            raise UserError(f"{resume}: has all {trainer.cfg.epoch} epochs of the config already")
    elif config.get("pretrain_weights"):
        loaded, wanted = load(trainer.model, config.pretrain_weights)
        LOGGER.info(f"{config.pretrain_weights}: {loaded}/{wanted} tensors of the backbone loaded")
    else:
        _check_variant(trainer.model)
        LOGGER.warning("no pretrain_weights: the backbone starts from random weights")
    trainer.train(validate=config.get("validate", True))
    return trainer.results


def _whole(trainer, path):
    """Sets all weights of a checkpoint of PaddleDetection, and where it trains its optimizer. Raises UserError."""
    stem = str(path)[:-len(".pdparams")] if str(path).endswith(".pdparams") else str(path)
    for suffix in (".pdparams", ".pdopt")[:1 if trainer.optimizer is None else 2]:
        if not os.path.isfile(stem + suffix):
            raise UserError(f"{stem}{suffix}: no such file; give a checkpoint of PaddleDetection without suffix")
    arrays, state = paddle.load(stem + ".pdparams", return_numpy=True), trainer.model.state_dict()
    unfit = [name for name, value in state.items() if name not in arrays or list(arrays[name].shape) != list(value.shape)]
    if unfit:
        raise UserError(f"{stem}.pdparams: {len(unfit)} of the {len(state)} tensors of the config's model are missing or of "
                        f"another shape: {listed(unfit)}")
    trainer.resume_weights(stem)


def evaluate(config):
    """`results` of the checkpoint that the config names under `weights`: {"bbox": AP, AP50, AP75, …, "mask": …}."""
    trainer = Trainer(config, "eval")
    _whole(trainer, config.weights)
    trainer.evaluate()
    return trainer.results


def export_model(config, folder):
    """Writes the network with weights `weights` for Paddle Inference (pictures one by one) under `folder`; returns where."""
    merge_config({"export_onnx": True})  # the form without loops over pictures, which are what to_static refuses
    trainer = Trainer(config, "test")
    _whole(trainer, config.weights)
    with _full_graph():
        trainer.export(str(folder))
    return Path(folder) / config.filename
