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

import numpy as np
import paddle
import paddle.nn.functional as F
import paddleseg
from paddle import nn
from paddleseg.cvlibs import manager
from paddleseg.transforms import RandomPaddingCrop, functional
from paddleseg.utils import logger, metrics, utils

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
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
