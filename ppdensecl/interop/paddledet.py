"""Fine-tuning with PaddleDetection: importing this registers what its configs lack, and the functions run a config.

The parts: `paddledet_config.py` reads a config, `paddledet_components.py` registers, `paddledet_backbone.py` loads
pretrained weights with proof, `paddledet_repairs.py` mends PaddleDetection 2.6.0.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import paddle
import ppdet.engine
from paddle import nn
from ppdet.core.workspace import merge_config
from ppdet.engine.callbacks import Callback

from ppdensecl import parallel
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import voc07
from ppdensecl.interop import precise_bn
from ppdensecl.interop.layouts import listed
from ppdensecl.interop.paddledet_components import IterationSteps  # which registers the others too
from ppdensecl.interop.paddledet_backbone import check_variant, load
from ppdensecl.interop.paddledet_config import read_config  # noqa: F401 (for the tool)
from ppdensecl.interop.paddledet_repairs import LOGGER, full_graph, repair


def start_ranks():
    """To be called before everything else where several processes share the work; alone it does nothing."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1:
        ppdet.engine.init_parallel_env()


class Trainer(ppdet.engine.Trainer):
    """PaddleDetection's, which also keeps the last evaluation: `results` {"bbox": 12 numbers of COCO, "mask": …, and where the config
    has voc07, "voc07": [AP, AP50, AP75] as `evaluation.voc07` counts them}."""

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
        classes = getattr(self.dataset, "catid2clsid", None)  # where it was read already
        if classes and len(classes) != config.num_classes:
            raise UserError(f"the annotations have {len(classes)} categories, but 'num_classes' is {config.num_classes}; set "
                            f"num_classes={len(classes)}")
        if mode == "train":
            if len(self.loader) == 0:
                raise UserError(f"the training data has {len(self.dataset)} pictures, fewer than one batch for each GPU; use a "
                                "smaller batch")
            self.whole_loader = self.loader
            if config.get("iterations"):
                last = max((max(steps.milestones) for steps in config.LearningRate["schedulers"]
                            if isinstance(steps, IterationSteps) and steps.milestones), default=0)
                if last >= config.iterations:
                    LOGGER.warning(f"the learning rate falls at {last} iterations, but the training has {config.iterations}; set "
                                   "LearningRate.schedulers")
                self.cfg.epoch = self.end_epoch = math.ceil(config.iterations / len(self.loader))

    def _reset_metrics(self):
        found = {kind: list(numbers) for metric in self._metrics for kind, numbers in metric.get_results().items()}
        if found and self.cfg.get("voc07"):
            (metric,) = self._metrics
            with open(metric.anno_file, encoding="utf-8") as file:
                each = voc07.average_precision(json.load(file)["annotations"], metric.results["bbox"])
            found["voc07"] = [float(np.mean(list(each.values()))), each[50], each[75]]
        self.results = found or self.results
        super()._reset_metrics()

    def train(self, validate=False):
        if self.cfg.get("iterations"):
            self.loader = _Shortened(self.loader, self.cfg.iterations - self.start_epoch * len(self.loader))
        if self.cfg.get("precise_bn"):
            self._compose_callback._callbacks.insert(0, _PreciseBN(self))  # before the one that writes the checkpoint
        super().train(validate)

    def precise_bn(self, batches):
        """Estimates BatchNorm's statistics anew from the training data; see `precise_bn.py`."""
        used, total = precise_bn.estimate(self.model, precise_bn.repeated(self.whole_loader, batches))
        LOGGER.info(f"precise BN: statistics of {used} of {total} BatchNorms estimated from {batches} batches")


class _PreciseBN(Callback):
    """What is saved and evaluated at the end has precise statistics; before, training goes on with its own."""

    def on_epoch_end(self, status):
        trainer = self.model  # as PaddleDetection calls it
        if status["mode"] == "train" and status["epoch_id"] == trainer.end_epoch - 1:
            trainer.precise_bn(trainer.cfg.precise_bn)


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
    """Trains; returns the last evaluation's `results`. `resume` is a checkpoint without suffix. Raises UserError.

    Where the config has `precise_bn`, model_final has the statistics of so many batches, and is evaluated with them.
    """
    if config.get("seed") is not None:
        for seeded in (random.seed, np.random.seed, paddle.seed):
            seeded(config.seed)
    trainer = Trainer(config, "train")
    if resume is not None:
        _resume(trainer, resume)
        if trainer.start_epoch >= trainer.cfg.epoch:
            raise UserError(f"{resume}: has all {trainer.cfg.epoch} epochs of the config already")
    elif config.get("pretrain_weights"):
        count = load(trainer.model, config.pretrain_weights)
        LOGGER.info(f"{config.pretrain_weights}: {count}/{count} tensors of the backbone loaded")
    else:
        check_variant(trainer.model)
        LOGGER.warning("no pretrain_weights: the backbone starts from random weights")
    trainer.train(validate=config.get("validate", True))
    return trainer.results


def _stem(path):
    return str(path)[:-len(".pdparams")] if str(path).endswith(".pdparams") else str(path)


def _whole(model, path):
    """Sets all weights of a checkpoint of PaddleDetection; `path` with or without suffix. Raises UserError."""
    file, state = f"{_stem(path)}.pdparams", model.state_dict()
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; give a checkpoint of PaddleDetection without suffix")
    arrays = checkpoint.read_arrays(file)
    unfit = [name for name, value in state.items() if name not in arrays or list(arrays[name].shape) != list(value.shape)]
    unfit += [name for name in arrays if name not in state]
    if unfit:
        raise UserError(f"{file}: {len(unfit)} of the {len(state)} tensors of the config's model are missing, of "
                        f"another shape or too many: {listed(unfit)}")
    for name, value in state.items():
        value.set_value(arrays[name].astype(str(value.dtype).rpartition(".")[2]))


def _resume(trainer, path):
    """Also where it was, and its optimizer, which PaddleDetection loads. Raises UserError."""
    optimizer = f"{_stem(path)}.pdopt"
    if not os.path.isfile(optimizer):
        raise UserError(f"{optimizer}: no such file; give a checkpoint of PaddleDetection without suffix")
    _whole(trainer.model, path)
    checkpoint.read_nested(optimizer)  # PaddleDetection reads it again, and would run what it asks for
    trainer.resume_weights(_stem(path))


def evaluate(config):
    """`results` of the checkpoint that the config names under `weights`: {"bbox": AP, AP50, AP75, …, "mask": …}."""
    trainer = Trainer(config, "eval")
    _whole(trainer.model, config.weights)
    trainer.evaluate()
    return trainer.results


def make_precise(config, out):
    """Writes the checkpoint `weights` of the config to `out`, a .pdparams, with precise BatchNorm statistics.

    They are of `precise_bn` (default 200) training batches on each rank; all else stays bit for bit. Raises UserError.
    """
    source = f"{_stem(config.weights)}.pdparams"
    precise_bn.check_output(out, source)
    checkpoint.make_folder(Path(out).parent)
    merge_config({"validate": False})
    trainer = Trainer(config, "train")
    _whole(trainer.model, source)
    if config.get("norm_type") == "sync_bn" and config.use_gpu and parallel.world_size() > 1:  # as in its training
        trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
    trainer.precise_bn(config.get("precise_bn") or precise_bn.BATCHES)
    if parallel.is_main():
        checkpoint.write_arrays(out, {name: value.numpy() for name, value in trainer.model.state_dict().items()})


def export_model(config, folder):
    """Writes the network with weights `weights` for Paddle Inference (pictures one by one) under `folder`; returns where."""
    annotations = Path(config.EvalDataset["dataset_dir"], config.EvalDataset["anno_path"])
    if not annotations.is_file():  # PaddleDetection would write COCO's 80 names
        raise UserError(f"{annotations}: no such file, which has the names of the classes; set EvalDataset.dataset_dir and anno_path")
    config.TestDataset["dataset_dir"], config.TestDataset["anno_path"] = map(config.EvalDataset.get, ("dataset_dir", "anno_path"))
    checkpoint.make_folder(folder)
    merge_config({"export_onnx": True})  # the form without loops over pictures, which are what to_static refuses
    trainer = Trainer(config, "test")
    _whole(trainer.model, config.weights)
    with full_graph():
        trainer.export(str(folder))
    return Path(folder) / config.filename
