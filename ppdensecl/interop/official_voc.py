"""PASCAL VOC as it is downloaded, for the fine-tuning configs: COCO json of its boxes, and the lists of train_aug.

Each task yields sentences for the user as it goes. What is missing or broken raises UserError, which names the file and
the download that it is part of. What is there already is not written again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ppdensecl.errors import UserError
from ppdensecl.evaluation.labelled import VOC_CLASSES as CLASSES
from ppdensecl.interop.official_data import (IGNORED, check_all, check_label, counted, existing, in_processes, read_json,
                                             write, write_label)

SITE = "http://host.robots.ox.ac.uk/pascal/VOC"
TRAINVAL_2007 = f"VOCtrainval_06-Nov-2007.tar ({SITE}/voc2007)"
TEST_2007 = f"VOCtest_06-Nov-2007.tar ({SITE}/voc2007)"
TRAINVAL_2012 = f"VOCtrainval_11-May-2012.tar ({SITE}/voc2012)"
SBD = "the SBD archive benchmark.tgz (http://home.bharathh.info/pubs/codes/SBD/download.html)"
# json, whether difficult objects are left out of the evaluation, official number of pictures, (year, list, download)
DETECTION = (
    ("instances_trainval0712.json", False, 16_551, (("2007", "trainval", TRAINVAL_2007), ("2012", "trainval", TRAINVAL_2012))),
    ("instances_test07.json", True, 4_952, (("2007", "test", TEST_2007),)),
)


# Boxes.

class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *_):  # before an entity is declared: those that expand to gigabytes need one
        raise ValueError("has a DOCTYPE, which annotations never have")


def read_xml(path, classes=CLASSES):
    """(width, height, [(class, (xmin, ymin, xmax, ymax), difficult)]) of an annotation, the corners as they are written.

    Corners are 1-based and inclusive: a box of the whole picture is (1, 1, width, height). A few of VOC 2012 have
    fractions. Boxes of an object's <part>s are no objects. Raises UserError.
    """
    try:
        content = Path(path).read_bytes()
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDoctype()))
        width, height = (_number(_text(root, f"size/{side}")) for side in ("width", "height"))
        if not (type(width) is type(height) is int and width > 0 and height > 0):
            raise ValueError(f"says that the picture is of {width} × {height} pixels")
        found = []
        for item in root.findall("object"):
            name = _text(item, "name")
            if name not in classes:
                raise ValueError(f"has an object of class {name!r}, which is none of {', '.join(classes)}")
            box = tuple(_number(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # A pixel too far may be somebody's counting from 0.
            if not (0 <= box[0] <= box[2] <= width + 1 and 0 <= box[1] <= box[3] <= height + 1):
                raise ValueError(f"has a box {box} (xmin, ymin, xmax, ymax) that is no part of {width} × {height} pixels")
            difficult = item.findtext("difficult", "0").strip()
            if difficult not in ("0", "1"):
                raise ValueError(f"has an object with difficult = {difficult!r}; it should be 0 or 1")
            found.append((name, box, int(difficult)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is no valid XML ({error}); unpack it again") from None
    except (ValueError, LookupError) as error:  # LookupError: an encoding that is none
        raise UserError(f"{path}: {error}") from None
    return width, height, found


def _text(element, path):
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"has no <{path.replace('/', '><')}> in its <{element.tag}>")
    return text


def _number(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has {text!r} where a number should be")
    return int(value) if value == int(value) else value


def to_coco(annotations, classes=CLASSES, leave_out_difficult=False):
    """COCO's dict of {file name: what read_xml gave}; ids count from 1, in the given order, categories in that of `classes`.

    A pixel is 1 wide, so the box of corners (xmin, …) is x, y = xmin - 1, ymin - 1 and xmax - xmin + 1 wide, which covers
    the whole picture for (1, 1, width, height). Source: detectron2/data/datasets/pascal_voc.py, whose corners in
    space are (xmin - 1, ymin - 1, xmax, ymax). That file trains on difficult objects as on others, hence no mark in
    training. COCO's evaluation overwrites "ignore" by "iscrowd", so `leave_out_difficult` sets the latter.
    """
    images, objects = [], []
    for name, (width, height, found) in annotations.items():
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        for label, (xmin, ymin, xmax, ymax), difficult in found:
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            objects.append({"id": len(objects) + 1, "image_id": len(images), "category_id": classes.index(label) + 1,
                            "bbox": box, "area": box[2] * box[3], "iscrowd": difficult if leave_out_difficult else 0,
                            "difficult": difficult})
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": objects, "categories": categories}


def check_json(path, annotations, leave_out_difficult=False):
    """Reads the json back; UserError unless every picture's size, boxes, classes and difficult flags come out again."""
    content = read_json(path, "what was just written")
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {image["file_name"]: (image["width"], image["height"], []) for image in content["images"]}
    file_names = {image["id"]: image["file_name"] for image in content["images"]}
    for item in content["annotations"]:
        x, y, width, height = item["bbox"]
        corners = x + 1, y + 1, x + width, y + height
        if item["iscrowd"] != (item["difficult"] if leave_out_difficult else 0):
            corners = None
        found[file_names[item["image_id"]]][2].append((names[item["category_id"]], corners, item["difficult"]))
    for name in annotations.keys() | found.keys():
        if not _same(annotations.get(name), found.get(name)):
            raise UserError(f"{path}: its boxes of {name} are not those of the xml; delete the json and try again")


def _same(one, other):
    """Equal; sums of fractions may differ in their last digits."""
    def rounded(boxes):
        return [(label, corners and [round(corner, 6) for corner in corners], difficult) for label, corners, difficult in boxes]
    return one is not None and other is not None and one[:2] == other[:2] and rounded(one[2]) == rounded(other[2])


def detection(root, output=None):
    """Writes annotations/instances_trainval0712.json and instances_test07.json below `output` (default: `root`)."""
    root, output = existing(root, f"PASCAL VOC, see {SITE}"), Path(root if output is None else output)
    if not output.is_dir():
        raise UserError(f"{output}: no such folder; make it first, or give another --output")
    for file, leave_out, official, parts in DETECTION:
        annotations = {}
        for year, split, download in parts:
            folder = root / f"VOC{year}"
            names = read_list(folder / "ImageSets" / "Main" / f"{split}.txt", download)
            check_all(folder / "JPEGImages", [f"{name}.jpg" for name in names], download)
            check_all(folder / "Annotations", [f"{name}.xml" for name in names], download)
            for name in names:
                annotations[f"VOC{year}/JPEGImages/{name}.jpg"] = read_xml(folder / "Annotations" / f"{name}.xml")
        content = to_coco(annotations, leave_out_difficult=leave_out)
        path = output / "annotations" / file
        new = write(path, json.dumps(content, separators=(",", ":")).encode())
        check_json(path, annotations, leave_out)
        difficult = sum(item["difficult"] for item in content["annotations"])
        yield (counted(path, len(annotations), official) + f", {len(content['annotations']):,} objects ({difficult:,} difficult, "
               + ("left out of the evaluation" if leave_out else "trained on like the others") + "); "
               + ("written" if new else "it was there already") + ", read back and equal to the xml")


# Segmentation.

def segmentation(root, sbd=None, workers=1):
    """Checks VOC 2012's and SBD's labels, and writes ImageSets/Segmentation/aug.txt where it is missing.

    PaddleSeg's PascalVOC trains on train.txt with SegmentationClass and aug.txt with SegmentationClassAug: together
    the train_aug of 10,582 pictures. `sbd` is the unpacked folder benchmark_RELEASE, from which SegmentationClassAug is made.
    """
    folder = existing(root, f"PASCAL VOC, see {SITE}") / "VOC2012"
    lists, augmented = folder / "ImageSets" / "Segmentation", folder / "SegmentationClassAug"
    train, val = (read_list(lists / f"{split}.txt", TRAINVAL_2012) for split in ("train", "val"))
    for names in (train, val):
        check_all(folder / "JPEGImages", [f"{name}.jpg" for name in names], TRAINVAL_2012)
        check_all(folder / "SegmentationClass", [f"{name}.png" for name in names], TRAINVAL_2012)
    yield counted("train", len(train), 1_464) + "; " + counted("val", len(val), 1_449)
    if sbd is not None:
        yield from _from_sbd(Path(sbd), augmented, {*train, *val}, workers)
    if not augmented.is_dir():
        raise UserError(f"{augmented}: no such folder; it is made of {SBD}: unpack that, and give its folder with --sbd "
                        "benchmark_RELEASE")
    path, new = lists / "aug.txt", False
    if not path.exists():
        if (lists / "trainaug.txt").exists():
            source = read_list(lists / "trainaug.txt", SBD)
        else:
            source = [file.stem for file in augmented.glob("*.png")]
        names = sorted(set(source) - {*train, *val})
        if not names:
            raise UserError(f"{augmented}: has no labels beyond train.txt and val.txt; it should have those of {SBD}")
        check_all(augmented, [f"{name}.png" for name in names], SBD)
        new = write(path, "".join(f"{name}\n" for name in names).encode())
    names = read_list(path, SBD)
    both = sorted({*names} & {*train, *val})
    if both:
        raise UserError(f"{path}: lists {both[0]}, which is in {'val.txt' if both[0] in val else 'train.txt'}; delete "
                        f"{path.name} to have it made anew")
    check_all(augmented, [f"{name}.png" for name in names], SBD)
    check_all(folder / "JPEGImages", [f"{name}.jpg" for name in names], TRAINVAL_2012)
    for labels, listed in (("SegmentationClass", train + val), ("SegmentationClassAug", names)):
        for name in listed:
            check_label(folder / "JPEGImages" / f"{name}.jpg", folder / labels / f"{name}.png")
    yield (counted("train_aug", len(train) + len(names), 10_582) + f", all labels as large as their pictures; {path} "
           + ("written" if new else "was there already"))


def _from_sbd(sbd, augmented, known, workers):
    lists = [name for split in ("train", "val") for name in read_list(sbd / "dataset" / f"{split}.txt", SBD)]
    names = sorted({*lists} - known)
    check_all(sbd / "dataset" / "cls", [f"{name}.mat" for name in names], SBD)
    try:
        augmented.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{augmented}: cannot be made ({error.strerror})") from None
    missing = [(str(sbd / "dataset" / "cls" / f"{name}.mat"), str(augmented / f"{name}.png")) for name in names
               if not (augmented / f"{name}.png").exists()]
    if missing:
        try:
            import scipy.io  # noqa: F401 (here, so that its absence is one sentence, and the processes have it already)
        except ImportError as error:
            raise UserError(f"SBD's files need scipy, which cannot be imported ({error}); pip install scipy") from None
    yield f"SBD: {len(names):,} pictures beyond train and val, {len(missing):,} labels to make"
    in_processes(_label_of_mat, missing, workers)


def _label_of_mat(paths):
    from scipy.io import loadmat

    mat, png = paths
    try:
        label = np.asarray(loadmat(mat)["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # of many kinds, by what is broken in the file
        raise UserError(f"{mat}: cannot be read as a label of SBD ({type(error).__name__}: {error}); unpack it again") from None
    if label.dtype != np.uint8 or label.ndim != 2 or (label[label != IGNORED] > len(CLASSES)).any():
        raise UserError(f"{mat}: should hold class numbers from 0 to {len(CLASSES)}, uint8 [H, W]")
    write_label(png, label)


def read_list(path, download):
    """The names in a list of VOC, one a line. Raises UserError."""
    try:
        names = existing(path, download).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if not names or twice or any(os.sep in name for name in names):
        wrong = f"lists {twice} twice" if twice else "should have a name of a picture per line"
        raise UserError(f"{path}: {wrong}; it is part of {download}")
    return names
