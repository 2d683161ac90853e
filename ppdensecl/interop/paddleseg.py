"""Fine-tuning with PaddleSeg: train, evaluate, estimate BatchNorm anew and export, through PaddleSeg's own functions.

Importing this registers what the configs need, see `paddleseg_components.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import paddle
import paddleseg.core
import yaml
from paddleseg.cvlibs import Config, SegBuilder
from paddleseg.deploy.export import WrappedModel
from paddleseg.transforms import Compose
from paddleseg.utils import utils, visualize

from ppdensecl import parallel
from ppdensecl.data.picture import UndecodableError
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.files import replacing
from ppdensecl.inference.pictures import open_pictures
from ppdensecl.interop import precise_bn
from ppdensecl.interop.paddleseg_components import load  # which registers them

_REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
             yaml.YAMLError)


def read_config(path, dataset_root=None, pretrained=None, **options):
    """PaddleSeg's Config of a file, with another folder of pictures and other pretrained weights of the backbone.

    The lists of a data set of type `Dataset` move with its folder, but for absolute paths. options: PaddleSeg's learning_rate, batch_size, iters,
    opts. Raises UserError.
    """
    try:
        config = Config(str(path), **options)
        for part in ("train_dataset", "val_dataset"):
            section = config.dic[part]
            before = section["dataset_root"]
            section["dataset_root"] = before if dataset_root is None else str(dataset_root)
            for key in ("train_path", "val_path"):
                if key in section and dataset_root is not None and not os.path.isabs(section[key]):
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


def predict(config, model_path, pictures, save_dir, **options):
    """Writes the class of each pixel of `pictures` (a picture, a folder, or a list in a .txt) as SAVE_DIR/NAME.png, with
    PaddleSeg's colours as palette; see `_mask_files`. Returns how many. options: as of `evaluate`. Raises UserError."""
    source = open_pictures(pictures, "--image_path")
    files = _mask_files([source.name(i) for i in range(len(source))], pictures, Path(save_dir))
    builder = SegBuilder(config)
    transforms, model = Compose(_built(builder, "val_transforms")), whole_model(builder, model_path)
    colours = visualize.get_color_map_list(256)
    sliding = {name: value for name, value in {**config.test_config, **options}.items()
               if name in ("is_slide", "stride", "crop_size")}
    for i, file in enumerate(files):
        try:
            seen = transforms({"img": source.picture(i)[:, :, ::-1].astype(np.float32)})  # which takes BGR
            with paddle.no_grad():
                batch = paddle.to_tensor(seen["img"][None])
                found, _ = paddleseg.core.infer.inference(model, batch, seen["trans_info"], **sliding)
            checkpoint.make_folder(file.parent)
            with replacing(file) as mask:
                visualize.get_pseudo_color_map(found.numpy()[0, 0], colours).save(mask, "PNG")
        except (UndecodableError, UserError) as error:
            raise UserError(f"{error}; {i} of {len(files)} masks were written to {save_dir}") from None
    return len(files)


def _mask_files(names, pictures, save_dir):
    """The file of each picture's mask. The names keep their place below the folder of `pictures`; those of a list, if some lie
    elsewhere, below the folder that they share. So no mask is written outside `save_dir`.

    Raises UserError where one would replace a picture, or another mask.
    """
    root = pictures if os.path.isdir(pictures) else os.path.dirname(os.path.abspath(pictures))
    if any(os.path.relpath(name, root).startswith(os.pardir + os.sep) for name in names):
        root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    read, owners = {_identity(name) for name in names} - {None}, {}
    for name in names:
        file = save_dir / Path(os.path.relpath(name, root)).with_suffix(".png")
        if _identity(file) in read:
            raise UserError(f"--save_dir {save_dir}: the mask of {name} would replace the picture {file}; give another folder")
        if file in owners:
            raise UserError(f"--image_path: {owners[file]} and {name} would have the same mask, {file}; give each picture once, "
                            "and a name of its own before the suffix")
        owners[file] = name
    return list(owners)


def _identity(path):
    """What tells that two names are one file, or None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


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
