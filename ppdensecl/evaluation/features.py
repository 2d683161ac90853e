"""Frozen features: a backbone from any checkpoint, and what it says about pictures."""

from __future__ import annotations

import re

import cv2
import numpy as np
import paddle

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.models import ResNet
from ppdensecl.models.densecl import normalise
from ppdensecl.models.resnet import BLOCKS

_PREFIX = "encoder_q.backbone."


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


@paddle.no_grad()
def pooled(backbone, pictures, size, batch_size=64):
    """Average-pooled last maps of an iterable of uint8 [H, W, 3] pictures, resized to size (h, w): float32 [n, C]."""
    found, waiting = [], []

    def flush():
        if waiting:
            found.append(backbone(normalise(paddle.to_tensor(np.stack(waiting)))).mean([2, 3]).numpy())
            waiting.clear()

    for picture in pictures:
        waiting.append(cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA))
        if len(waiting) == batch_size:
            flush()
    flush()
    return np.concatenate(found)
