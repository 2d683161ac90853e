"""COCO and Cityscapes as they are downloaded: checked, and completed by what the fine-tuning configs read.

Each function yields sentences for the user as it goes. What is missing or broken raises UserError, which names the
file and the download that it is part of. What is there already is not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ppdensecl.data.worker import Worker, answers
from ppdensecl.errors import UserError

COCO = "https://cocodataset.org/#download"
COCO_PICTURES = {"train2017": 118_287, "val2017": 5_000}
CITYSCAPES = "https://www.cityscapes-dataset.com/downloads"
CITYSCAPES_ARCHIVES = {name: f"{name}_trainvaltest.zip ({CITYSCAPES})" for name in ("leftImg8bit", "gtFine")}
CITYSCAPES_PICTURES = {"train": 2_975, "val": 500}
# The 19 classes among Cityscapes' 34 ids, in the order of their train ids. Source: cityscapesscripts/helpers/labels.py
CITYSCAPES_CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
IGNORED = 255


# What all data sets share.

def existing(path, download):
    """`path`, or UserError if it is not there; `download` says what it is part of."""
    if not os.path.exists(path):
        raise UserError(f"{path}: is not there; it is part of {download}")
    return Path(path)


def check_all(folder, names, download):
    """UserError unless the folder has all files `names`."""
    try:
        there = {*os.listdir(existing(folder, download))}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder ({error.strerror}); it is part of {download}") from None
    gone = [name for name in names if name not in there]
    if gone:
        more = f" and {len(gone) - 1} more of its files are" if len(gone) > 1 else " is"
        raise UserError(f"{folder}/{gone[0]}{more} missing; unpack all of {download}")


def check_label(picture, label):
    """UserError unless the file `label` holds one number a pixel, for every pixel of the file `picture`. Reads their heads."""
    sizes = []
    for path in (picture, label):
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as a picture ({error}); unpack it again") from None
    if image.mode not in ("P", "L"):
        raise UserError(f"{label}: is a picture of mode {image.mode}; a label has one channel, of class numbers (L or P)")
    if sizes[0] != sizes[1]:
        raise UserError(f"{label}: is of {sizes[1][0]} × {sizes[1][1]} pixels, but {picture} of {sizes[0][0]} × {sizes[0][1]}")


def counted(what, count, official):
    return f"{what}: {count:,} pictures" + ("" if count == official else f" (note: the official number is {official:,})")


def read_json(path, download):
    try:
        return json.loads(existing(path, download).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); unpack it again from {download}") from None


def write(path, content):
    """Writes the bytes under a temporary name, which then becomes `path`. Returns False if they were there already."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")  # not seen by who looks for *.png
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return True


def write_label(path, label):
    """Writes uint8 [H, W] as a grey PNG, as `write` does."""
    content = io.BytesIO()
    Image.fromarray(label).save(content, "PNG")
    write(path, content.getvalue())


def in_processes(function, items, workers):
    """Calls function(item) for all items, in `workers` processes. The first UserError of any of them is raised."""
    def answer(item):
        try:
            function(item)
        except UserError as error:  # raised in the worker it would be a traceback
            return error

    advice = "the same command goes on where it was; try fewer --workers"
    team = [Worker(answer, f"worker {number}", advice) for number in range(min(workers, len(items)))]
    try:
        for error in answers(team, items):
            if error is not None:
                raise error
    finally:
        for worker in team:
            worker.close()


# COCO.

def coco(root, fraction=0.1, seed=0):
    """Checks train2017, val2017 and their instances; writes the instances of a `fraction` of the training pictures.

    Which pictures these are depends on the ids and the seed alone; with one seed, a smaller fraction is part of a larger one.
    The file is annotations/instances_train2017_10pct.json, with another seed than 0 …_10pct_seed1.json.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--fraction is {fraction}; it should be above 0 and below 1")
    root, content = existing(root, f"COCO, see {COCO}"), {}
    for split in ("val2017", "train2017"):
        path = root / "annotations" / f"instances_{split}.json"
        content = read_json(path, f"annotations_trainval2017.zip ({COCO})")
        try:
            names = [image["file_name"] for image in content["images"]]
            ids = [image["id"] for image in content["images"]]
            owners = [annotation["image_id"] for annotation in content["annotations"]]
            if not all(isinstance(name, str) for name in names) or not all(isinstance(number, int) for number in ids + owners):
                raise TypeError
        except (KeyError, TypeError):
            raise UserError(f'{path}: should hold lists "images", with "id" and "file_name", and "annotations", with '
                            '"image_id"') from None
        if not ids:
            raise UserError(f'{path}: has an empty list "images"')
        check_all(root / split, names, f"{split}.zip ({COCO})")
        yield counted(split, len(names), COCO_PICTURES[split]) + f", all there; {len(owners):,} objects"
    chosen = drawn(ids, fraction, seed)
    part = {**content, "images": [image for image in content["images"] if image["id"] in chosen],
            "annotations": [note for note in content["annotations"] if note["image_id"] in chosen],
            "info": {"description": f"{fraction:g} of instances_train2017.json, seed {seed}"}}
    name = f"instances_train2017_{100 * fraction:g}pct" + (f"_seed{seed}" if seed else "")
    path = root / "annotations" / f"{name}.json"
    new = write(path, json.dumps(part, separators=(",", ":")).encode())
    yield (f"{path}: {len(part['images']):,} pictures, {len(part['annotations']):,} objects, digest of the ids {digest(chosen)}"
           + ("; written" if new else "; it was there already"))


def drawn(ids, fraction, seed):
    """The set of round(fraction × N) of N ids that have the smallest SHA-256 of "seed/id"; at least one."""
    ranked = sorted(ids, key=lambda number: hashlib.sha256(f"{seed}/{number}".encode()).digest())
    return set(ranked[:max(1, round(fraction * len(ids)))])


def digest(ids):
    """8 hex digits that say which set of ids it is."""
    return hashlib.sha256(" ".join(map(str, sorted(ids))).encode()).hexdigest()[:8]


# Cityscapes.

def cityscapes(root, workers=1):
    """Checks leftImg8bit and gtFine of train and val; makes *_gtFine_labelTrainIds.png where they are missing."""
    root = existing(root, f"Cityscapes, see {CITYSCAPES}")
    for split, official in CITYSCAPES_PICTURES.items():
        images, labels = (existing(root / name / split, archive) for name, archive in CITYSCAPES_ARCHIVES.items())
        pictures = _stems(images, "_leftImg8bit.png")
        ids, made = (_stems(labels, f"_gtFine_{kind}.png") for kind in ("labelIds", "labelTrainIds"))
        # PaddleSeg pairs the two sorted lists one by one: one file too many, and the rest get the labels of others.
        for alone, has, path in ((pictures - ids - made, "a picture but no label", labels),
                                 ((ids | made) - pictures, "a label but no picture", images)):
            if alone:
                archive = CITYSCAPES_ARCHIVES[path.parent.name]
                raise UserError(f"{path}: {min(alone)} has {has} ({len(alone)} in all); unpack all of {archive}")
        if not pictures:
            raise UserError(f"{images}: has no CITY/*_leftImg8bit.png; unpack {CITYSCAPES_ARCHIVES['leftImg8bit']}")
        yield counted(split, len(pictures), official) + f", {len(pictures - made):,} labels to make"
        in_processes(_train_ids, [f"{labels}/{stem}_gtFine" for stem in sorted(pictures - made)], workers)
        for stem in sorted(pictures):
            check_label(images / f"{stem}_leftImg8bit.png", labels / f"{stem}_gtFine_labelTrainIds.png")
        yield f"{split}: all {len(pictures):,} labels are there, and as large as their pictures"


def _stems(folder, end):
    """{"aachen/aachen_000000_000019", …} of the files CITY/*end."""
    return {f"{path.parent.name}/{path.name[:-len(end)]}" for path in folder.glob(f"*/*{end}")}


def _train_ids(stem):
    path = f"{stem}_labelIds.png"
    try:
        with Image.open(path) as image:
            if image.mode != "L":
                raise UserError(f"{path}: is a picture of mode {image.mode}; Cityscapes' labels are grey (L)")
            label = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read ({error}); unpack it again from gtFine_trainvaltest.zip") from None
    if label.max() > 33:
        raise UserError(f"{path}: has the id {label.max()}; Cityscapes' ids are 0 to 33")
    table = np.full(256, IGNORED, np.uint8)
    table[list(CITYSCAPES_CLASSES)] = range(19)
    write_label(f"{stem}_labelTrainIds.png", table[label])
