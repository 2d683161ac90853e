"""What PaddleSeg lacks for fine-tuning a standard ResNet as the paper's transfers did. Importing this registers it.

| registered | |
|---|---|
| DenseCLResNet18 … DenseCLResNet152 | this project's ResNets; PaddleSeg's own have another stem ("vd") |
| FCNWithAuxiliary | mmsegmentation's FCN: 3×3 convolutions, the input concatenated, dropout, an auxiliary head on stage 3 |
| PixelCrossEntropy | the mean over all pixels, as mmsegmentation has it; PaddleSeg's own fails on Paddle 3 |
| BalancedCrop | a crop with at most 75 % of one class; PaddleSeg's own puts the label in the picture's place |

Source: open-mmlab/mmsegmentation, fcn_r50-d8. Pretrained weights are loaded by PaddleSeg's `load_pretrained_model`, but
that only warns where a tensor finds no place; here it is a UserError.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import paddleseg
import paddleseg.core
import yaml
from paddle import nn
from paddleseg.cvlibs import Config, SegBuilder, manager
from paddleseg.deploy.export import WrappedModel
from paddleseg.transforms import RandomPaddingCrop, functional
from paddleseg.utils import logger, metrics, utils

from ppdensecl import parallel
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import precise_bn
from ppdensecl.interop.layouts import listed
from ppdensecl.models import ResNet
from ppdensecl.models.resnet import BLOCKS


def load(model, path):
    """Lets PaddleSeg load `path` into `model`. Raises UserError unless every tensor of the model is in it and was set."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; write one with tools/export_finetune.py CHECKPOINT --to paddleseg --out {path}")
    arrays, state = checkpoint.read_arrays(path), model.state_dict()
    unfit = [name for name, value in state.items() if name not in arrays or list(arrays[name].shape) != list(value.shape)
             or arrays[name].dtype != np.float32]
    if not unfit:
        utils.load_pretrained_model(model, str(path))
        unfit = [name for name, value in model.state_dict().items() if not np.array_equal(value.numpy(), arrays[name])]
    if unfit:
        raise UserError(f"{path}: only {len(state) - len(unfit)} of {len(state)} tensors fit into {type(model).__name__}; "
                        f"missing, of another shape, or not float32: {listed(unfit)}")
    return len(state)


class _Backbone(ResNet):
    def __init__(self, depth, output_stride=8, in_channels=3, pretrained=None):
        if in_channels != 3:
            raise UserError(f"a backbone of this project takes pictures of 3 channels, not {in_channels}")
        super().__init__(depth, output_stride)
        if pretrained is not None:
            load(self, pretrained)

    def forward(self, x):
        return self.stages(x)


def _backbone(depth):
    def make(**options):
        """options: output_stride 8 (default), 16 or 32; pretrained, a file; in_channels 3. Its forward gives four maps."""
        return _Backbone(depth, **options)
    make.__name__ = f"DenseCLResNet{depth}"  # by which PaddleSeg registers it
    return make


DenseCLResNet18, DenseCLResNet34, DenseCLResNet50, DenseCLResNet101, DenseCLResNet152 = manager.BACKBONES.add_component(
    [_backbone(depth) for depth in BLOCKS])


def _conv_norm_relu(cin, cout):
    init = nn.initializer.Normal(0, (2 / (9 * cout)) ** 0.5)  # Kaiming with fan-out, as mmcv's ConvModule
    return nn.Sequential(nn.Conv2D(cin, cout, 3, padding=1, bias_attr=False, weight_attr=init), nn.BatchNorm2D(cout), nn.ReLU())


class _Head(nn.Layer):
    """`convs` 3×3 convolutions, where `concat` is set one more over their result beside the input; dropout, classifier."""

    def __init__(self, cin, channels, convs, concat, num_classes):
        super().__init__()
        self.convs = nn.Sequential(*(_conv_norm_relu(cin if n == 0 else channels, channels) for n in range(convs)))
        self.conv_cat = _conv_norm_relu(cin + channels, channels) if concat else None
        self.dropout = nn.Dropout2D(0.1)
        self.classifier = nn.Conv2D(channels, num_classes, 1, weight_attr=nn.initializer.Normal(0, 0.01))

    def forward(self, x):  # [N, cin, h, w] → logits [N, num_classes, h, w]
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(paddle.concat([x, y], 1))
        return self.classifier(self.dropout(y))


@manager.MODELS.add_component
class FCNWithAuxiliary(nn.Layer):
    """forward: x [N, 3, H, W] → [logits [N, num_classes, H, W]], in training also those of the auxiliary head, whose loss
    the config weighs with 0.4. `pretrained` is a whole model's file, to evaluate or export it."""

    def __init__(self, num_classes, backbone, channels=512, auxiliary_channels=256, align_corners=False, pretrained=None):
        super().__init__()
        self.backbone = backbone
        self.align_corners = align_corners
        self.head = _Head(backbone.feat_channels[3], channels, 2, True, num_classes)
        self.auxiliary_head = _Head(backbone.feat_channels[2], auxiliary_channels, 1, False, num_classes)
        if pretrained is not None:
            load(self, pretrained)

    def forward(self, x):
        maps = self.backbone(x)
        logits = [self.head(maps[3])] + ([self.auxiliary_head(maps[2])] if self.training else [])
        size = paddle.shape(x)[2:]
        return [F.interpolate(y, size, mode="bilinear", align_corners=self.align_corners) for y in logits]


@manager.LOSSES.add_component
class PixelCrossEntropy(nn.Layer):
    """logit [N, C, H, W], label int64 [N, H, W] → [1]: the sum over pixels that count, divided by the number of all pixels,
    or with `avg_non_ignore` (mmsegmentation's later option) of those that count."""

    def __init__(self, ignore_index=255, avg_non_ignore=False):
        super().__init__()
        self.ignore_index = ignore_index
        self.avg_non_ignore = avg_non_ignore

    def forward(self, logit, label):
        losses = F.cross_entropy(logit.transpose([0, 2, 3, 1]), label.unsqueeze(-1), ignore_index=self.ignore_index,
                                 reduction="none")
        counted = (label != self.ignore_index).astype(losses.dtype).sum().clip(1) if self.avg_non_ignore else label.size
        return (losses.sum() / counted).reshape([1])  # PaddleSeg's log reads loss[0], and a 0-d tensor has none


@manager.TRANSFORMS.add_component
class BalancedCrop(RandomPaddingCrop):
    """A random crop, drawn again (ten times at most) while one class has 75 % or more of its labelled pixels.

    crop_size (w, h). What lies outside of the picture is a grey near ImageNet's mean colour, and ignored.
    """

    def __init__(self, crop_size=(512, 512), category_max_ratio=0.75):
        super().__init__(crop_size, im_padding_value=114.5, category_max_ratio=category_max_ratio)

    def __call__(self, data):
        data = self._padding(data)
        for _ in range(self.loop_times):
            window = self._get_crop_coordinates(data["img"].shape[:2])
            classes, counts = np.unique(functional.crop(data["label"], window), return_counts=True)
            counts = counts[classes != self.ignore_index]
            if len(counts) > 1 and counts.max() < self.category_max_ratio * counts.sum():
                break
        for key in ("img", *data.get("gt_fields", [])):
            data[key] = functional.crop(data[key], window)
        return data


def _calculate_area(pred, label, num_classes, ignore_index=255):
    """Pixels of each class, int64 [num_classes] each: where both agree, predicted, labelled. [N, (1,) H, W] integers."""
    if list(pred.shape)[-2:] != list(label.shape)[-2:]:
        raise ValueError(f"the prediction has shape {list(pred.shape)} and the label {list(label.shape)}, expected the same")
    pred, label = (np.ravel(tensor.numpy()).astype(np.int64) for tensor in (pred, label))
    counts = label != ignore_index
    areas = (pred[counts & (pred == label)], pred[counts], label[counts & (label < num_classes)])
    return tuple(paddle.to_tensor(np.bincount(area, minlength=num_classes)[:num_classes], dtype="int64") for area in areas)


def repair():
    """Replaces what fails in PaddleSeg 2.8.0, and says so; other versions stay as they are."""
    if paddleseg.__version__ != "2.8.0":
        logger.warning(f"PaddleSeg {paddleseg.__version__}: ppdensecl knows 2.8.0, and repairs nothing here")
    elif metrics.calculate_area is not _calculate_area:
        metrics.calculate_area = _calculate_area
        logger.info("PaddleSeg 2.8.0: ppdensecl replaces utils.metrics.calculate_area, which concatenates 0-d tensors "
                    "(Paddle refuses that from 2.5 on)")


repair()


# What runs a config: train, eval and export through PaddleSeg's own functions.

_REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
             yaml.YAMLError)


def read_config(path, dataset_root=None, pretrained=None, **options):
    """PaddleSeg's Config of a file, with another folder of pictures and other pretrained weights of the backbone.

    The lists of a data set of type `Dataset` move with its folder. options: PaddleSeg's learning_rate, batch_size, iters,
    opts. Raises UserError.
    """
    try:
        config = Config(str(path), **options)
        for part in ("train_dataset", "val_dataset"):
            section = config.dic[part]
            before = section["dataset_root"]
            section["dataset_root"] = before if dataset_root is None else str(dataset_root)
            for key in ("train_path", "val_path"):
                if key in section and dataset_root is not None:
                    section[key] = os.path.join(dataset_root, os.path.relpath(section[key], before))
        if pretrained is not None:
            config.dic["model"]["backbone"]["pretrained"] = str(pretrained)
    except _REFUSALS as error:
        raise _refusal(error, path) from error
    return config


def _refusal(error, where):
    """What lies under PaddleSeg's layers of exceptions, as a UserError."""
    while error.__context__ is not None and not isinstance(error, UserError):
        error = error.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    return error if isinstance(error, UserError) else UserError(f"{where}: PaddleSeg refuses it: {text}")


def _built(builder, part):
    """A component of the config. A data set whose folder is not there is refused: PaddleSeg would download one."""
    if part.endswith("dataset"):
        root = builder.config.dic[part]["dataset_root"]
        if not root or not os.path.isdir(root):
            raise UserError(f"{root}: no such folder of pictures; give another with --dataset_root")
    try:
        built = getattr(builder, part)
    except _REFUSALS as error:
        raise _refusal(error, f"'{part}' of the config") from error
    if part.endswith("dataset"):
        _check_files(built.file_list)
    return built


def _check_files(pairs):
    """A picture or label that is not there, or Cityscapes' lists, of which PaddleSeg pairs the first with the first and so on
    also where a label is missing: a UserError."""
    for picture, label in pairs:
        missing = [path for path in (picture, label) if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{missing[0]}: no such file, but it is in the list of the data set")
        city = os.path.basename(picture).partition("_leftImg8bit")
        if city[1] and not os.path.basename(label).startswith(f"{city[0]}_gtFine"):
            raise UserError(f"{picture}: would go with the label {os.path.basename(label)}; each picture of the folder needs its "
                            "own, *_gtFine_labelTrainIds.png")


def _training_pictures(builder):
    pictures, total = _built(builder, "train_dataset"), builder.config.batch_size * parallel.world_size()
    if len(pictures) < total:  # PaddleSeg would wait for a first batch for ever
        raise UserError(f"the training data has {len(pictures)} pictures, fewer than a batch of {total}; "
                        "use a smaller --batch_size")
    return pictures


def train(config, save_dir, resume=None, evaluate=True, **options):
    """PaddleSeg's `train`, with its options; `resume` is a folder iter_N of an earlier run. Raises UserError."""
    builder = SegBuilder(config)
    pictures = _training_pictures(builder)
    validation = _built(builder, "val_dataset") if evaluate else None
    model = _built(builder, "model")
    if resume is not None:
        _check_resume(model, Path(resume), config.iters)
    model = utils.convert_sync_batchnorm(model, "gpu")  # where there are several
    checkpoint.make_folder(save_dir)  # PaddleSeg would delete a file of that name
    paddleseg.core.train(model, pictures, val_dataset=validation, optimizer=_built(builder, "optimizer"),
                         losses=_built(builder, "loss"), save_dir=str(save_dir), iters=config.iters,
                         batch_size=config.batch_size, resume_model=None if resume is None else str(resume),
                         test_config=config.test_config, to_static_training=config.to_static_training, **options)


def _check_resume(model, folder, iters):
    done = folder.name.rpartition("_")[2]
    if not (folder / "model.pdopt").is_file() or not done.isdecimal():
        raise UserError(f"{folder}: no folder of a checkpoint of PaddleSeg; give one named iter_N, with model.pdparams and "
                        "model.pdopt")
    if int(done) >= iters:
        raise UserError(f"{folder}: has {done} iterations already, and --iters is {iters}; give more, or another folder")
    load(model, folder / "model.pdparams")  # PaddleSeg would pass over what does not fit
    checkpoint.read_nested(folder / "model.pdopt")  # PaddleSeg reads it again, and would run what it asks for


def evaluate(config, model_path, **options):
    """mIoU and what else PaddleSeg's `evaluate` gives for a file of a whole model. options come before the config's."""
    builder = SegBuilder(config)
    pictures, model = _built(builder, "val_dataset"), whole_model(builder, model_path)
    names = ("mIoU", "Acc", "class_IoU", "class_precision", "Kappa")
    return dict(zip(names, paddleseg.core.evaluate(model, pictures, **{**config.test_config, **options})))


def make_precise(config, model_path, save_dir, batches=precise_bn.BATCHES, num_workers=2):
    """Writes SAVE_DIR/model.pdparams: the whole model with precise BatchNorm statistics, and all else bit for bit.

    They are of `batches` training batches on each rank. Returns a sentence for the user. Raises UserError.
    """
    out = Path(save_dir) / "model.pdparams"
    precise_bn.check_output(out, model_path)
    checkpoint.make_folder(save_dir)
    parallel.start()
    builder = SegBuilder(config)
    sampler = paddle.io.DistributedBatchSampler(_training_pictures(builder), config.batch_size, shuffle=True, drop_last=True)
    loader = paddle.io.DataLoader(sampler.dataset, batch_sampler=sampler, num_workers=num_workers, return_list=True,
                                  worker_init_fn=utils.worker_init_fn)
    model = utils.convert_sync_batchnorm(whole_model(builder, model_path), "gpu")
    pictures = (data["img"] for data in precise_bn.repeated(loader, batches))
    used, total = precise_bn.estimate(model, pictures)
    if parallel.is_main():
        checkpoint.write_arrays(out, {name: value.numpy() for name, value in model.state_dict().items()})
    return f"written: {out}; statistics of {used} of {total} BatchNorms estimated from {batches} batches"


def whole_model(builder, model_path):
    """The config's model with all weights of a file, and without the pretrained ones, which they replace. In eval mode."""
    builder.config.dic["model"]["backbone"]["pretrained"] = None
    model = _built(builder, "model")
    load(model, model_path)
    model.eval()
    return model


def export(config, model_path, save_dir, input_shape=(None, 3, None, None), output_op="argmax"):
    """Writes model.pdmodel (.json on Paddle 3), model.pdiparams and PaddleSeg's deploy.yaml. Returns the program's path."""
    builder = SegBuilder(config)
    model = WrappedModel(whole_model(builder, model_path), output_op)
    model.eval()
    model = paddle.jit.to_static(model, input_spec=[paddle.static.InputSpec(list(input_shape), "float32")], full_graph=True)
    stem = checkpoint.make_folder(save_dir) / "model"
    paddle.jit.save(model, str(stem))
    program = next(path for path in map(stem.with_suffix, (".json", ".pdmodel")) if path.is_file())
    deploy = {"model": program.name, "params": "model.pdiparams", "output_op": output_op,
              "transforms": config.val_dataset_cfg.get("transforms", []),
              "input_shape": [-1 if length is None else length for length in input_shape],
              "output_dtype": "int32" if output_op == "argmax" else "float32"}
    checkpoint.write_text(stem.with_name("deploy.yaml"), yaml.safe_dump({"Deploy": deploy}))
    return program
