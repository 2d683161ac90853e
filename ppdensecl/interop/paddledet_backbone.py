"""A ResNet's tensors under PaddleDetection's names, and loading them there with proof that all arrived.

Pretrained weights are loaded by PaddleDetection's `load_pretrain_weight`, which matches names by their ends and only
notes where a tensor finds no place; here it is a UserError. Its ResNet of `variant: b` is torchvision's; variant a has
the same names and shapes but other features, c and d have another stem.
"""

from __future__ import annotations

import math
import os
import re

import numpy as np
from ppdet.modeling.backbones.resnet import ResNet as TheirResNet
from ppdet.utils import checkpoint as their_checkpoint

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop.layouts import listed
from ppdensecl.models.resnet import BLOCKS

SHORT = "res2.res2a.short"  # a 1×1 convolution that PaddleDetection's ResNet-18 and 34 have and torchvision's have not


def names(depth):
    """{our name: PaddleDetection's name} of all tensors of the ResNet; 265 for depth 50."""
    found = {"conv1.weight": "conv1.conv1.conv.weight", **_norm("bn1", "conv1.conv1")}
    for stage, blocks in enumerate(BLOCKS[depth], 1):
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


def load(model, path):
    """Lets PaddleDetection load the backbone `path` into `model`; returns the number of tensors.

    Raises UserError unless every tensor of the file found its place and every tensor of the model's ResNet (res5 in a C4
    network's RoI head too) was set.
    """
    if not os.path.isfile(path) or not str(path).endswith(".pdparams"):
        raise UserError(f"{path}: no such .pdparams file; write one with tools/export_finetune.py CHECKPOINT --to paddledet "
                        "--out det.pdparams")
    check_variant(model)
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
    return len(wanted)


def _is_backbone(name, model):
    return isinstance(model, TheirResNet) or name.startswith("backbone.") or ".res5." in name


def check_variant(model):
    """Raises UserError where the model's ResNet has the names of ours and other features."""
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, TheirResNet) and layer.variant != "b":
            raise UserError(f"the config's ResNet is of variant {layer.variant}, which has other features; use ResNet.variant=b")
