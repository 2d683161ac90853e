"""VOC, COCO and Cityscapes as they are downloaded: what is written, what is missing, and the configs that read it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ppdensecl.errors import UserError
from ppdensecl.interop import official_data, official_voc
from test_prepare_data import alive, children

ROOT = Path(__file__).resolve().parent.parent
SIZE = 60, 48  # width, height of the generated pictures


def refused(words, function, *arguments, **options):
    """The function, and what it yields, ends in a UserError of one sentence with all `words`."""
    with pytest.raises(UserError) as caught:
        list(function(*arguments, **options))
    assert all(str(word) in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(path, seed=0):
    save(path, np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8))


def files(folder):
    """{path: (content, time of the last change)} of all files below."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def xml(objects, size=SIZE, more=""):
    """VOC's annotation of objects (class, (xmin, ymin, xmax, ymax), difficult), in VOC's own disorder."""
    text = f"<annotation>\n<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for name, (xmin, ymin, xmax, ymax), difficult in objects:
        text += (f"<object>\n\t<name>{name}</name><part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax>"
                 f"<ymax>3</ymax></bndbox></part><difficult>{difficult}</difficult><bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin>"
                 f"<ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox></object>")
    return text + more + "</annotation>"


OBJECTS = {
    ("2007", "trainval"): {"000005": [("chair", (1, 1, 60, 48), 0), ("person", (5, 7, 20, 31), 1)],
                           "000007": [("car", (9, 9, 9, 12), 0)]},
    ("2012", "trainval"): {"2008_000002": [("tvmonitor", (45.70000076293945, 2, 60, 30.5), 0)]},
    ("2007", "test"): {"000001": [("dog", (48, 10, 60, 40), 0), ("person", (8, 12, 35, 48), 0), ("dog", (1, 1, 20, 20), 1)],
                       "000002": [("train", (14, 20, 20, 30), 1)], "000003": []},
}


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit for detection and, with SegmentationClassAug but no aug.txt, for segmentation."""
    root = tmp_path / "VOCdevkit"
    for (year, split), pictures in OBJECTS.items():
        folder = root / f"VOC{year}"
        for name, objects in pictures.items():
            photo(folder / "JPEGImages" / f"{name}.jpg")
            (folder / "Annotations").mkdir(exist_ok=True)
            (folder / "Annotations" / f"{name}.xml").write_text(xml(objects))
        (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(pictures) + "\n")
    folder = root / "VOC2012"
    (folder / "ImageSets/Segmentation").mkdir()
    for split, names in (("train", ["t1", "t2"]), ("val", ["v1"]), ("", ["a1", "a2"])):
        for number, name in enumerate(names):
            photo(folder / "JPEGImages" / f"{name}.jpg", number)
            label = np.random.default_rng(number).integers(0, 21, (SIZE[1], SIZE[0])).astype(np.uint8)
            label[0] = 255
            for labels in ("SegmentationClass",) * bool(split) + ("SegmentationClassAug",):
                save(folder / labels / f"{name}.png", label)
        if split:
            (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


# VOC's boxes

def test_boxes_of_voc_in_coco(voc):
    said = list(official_voc.detection(voc))
    assert len(said) == 2 and "3 pictures (note: the official number is 16,551), 4 objects (1 difficult, trained on" in said[0]
    train, test = (json.loads((voc / f"annotations/instances_{name}.json").read_text()) for name in ("trainval0712", "test07"))
    assert [image["file_name"] for image in train["images"]] == [
        "VOC2007/JPEGImages/000005.jpg", "VOC2007/JPEGImages/000007.jpg", "VOC2012/JPEGImages/2008_000002.jpg"]
    assert [(image["id"], image["width"], image["height"]) for image in train["images"]] == [(n, 60, 48) for n in (1, 2, 3)]
    boxes = [(one["image_id"], one["category_id"], one["bbox"], one["area"], one["iscrowd"]) for one in train["annotations"]]
    assert boxes[:3] == [(1, 9, [0, 0, 60, 48], 2880, 0), (1, 15, [4, 6, 16, 25], 400, 0), (2, 7, [8, 8, 1, 4], 4, 0)]
    assert boxes[3][1] == 20 and np.allclose(boxes[3][2], [44.70000076, 1, 15.29999924, 29.5])
    assert [(category["id"], category["name"]) for category in train["categories"]][::19] == [(1, "aeroplane"), (20, "tvmonitor")]
    assert [one["iscrowd"] for one in test["annotations"]] == [0, 0, 1, 1] and len(test["images"]) == 3
    assert not any(one.get("ignore") for one in train["annotations"] + test["annotations"])  # PaddleDetection would drop it
    before = files(voc)
    assert all("it was there already" in sentence for sentence in official_voc.detection(voc)) and files(voc) == before


def test_difficult_objects_count_neither_way(voc):
    """COCO's own evaluation: found or not, a difficult object changes nothing; another one does."""
    COCO = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed").COCO
    from pycocotools.cocoeval import COCOeval

    list(official_voc.detection(voc))
    truth = COCO(str(voc / "annotations/instances_test07.json"))
    objects = [{"score": 0.9, **{key: one[key] for key in ("image_id", "category_id", "bbox")}}
               for one in truth.dataset["annotations"]]

    def ap(found):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return round(evaluation.stats[0], 3)

    assert ap(objects) == ap(objects[:2]) == 1  # dog, person; the others are difficult
    assert ap(objects[1:]) == 0.5
    assert ap([{**objects[3], "category_id": 12, "score": 1}, *objects[:2]]) == 0.75  # a train that is taken for a dog


def test_real_xml_gives_the_json_that_others_made(data_folder):
    root = data_folder / "bccd_voc"
    classes = tuple((root / "label_list.txt").read_text().split())
    for split, count in (("train", 2804), ("val", 1137), ("test", 945)):
        names = (root / f"ImageSets/Main/{split}.txt").read_text().split()
        ours = official_voc.to_coco({f"{name}.jpg": official_voc.read_xml(root / f"Annotations/{name}.xml", classes)
                                     for name in names}, classes)
        theirs = json.loads((root / f"annotations/instances_{split}.json").read_text())
        assert ours["images"] == theirs["images"] and len(ours["annotations"]) == count
        for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd"):
            assert [one[key] for one in ours["annotations"]] == [one[key] for one in theirs["annotations"]]


@pytest.mark.parametrize("damage", ["box", "class", "difficult", "size", "lost", "picture", "crowd"])
def test_reading_back_sees_what_is_wrong(tmp_path, damage):
    annotations = {"a.jpg": (60, 48, [("dog", (1.3, 2, 30, 40), 1)]), "b.jpg": (60, 48, [])}
    content = official_voc.to_coco(annotations, leave_out_difficult=True)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    official_voc.check_json(path, annotations, leave_out_difficult=True)
    one = content["annotations"][0]
    if damage in ("lost", "picture"):
        content["annotations" if damage == "lost" else "images"].pop()
    else:
        one.update({"box": {"bbox": [0.3, 1, 28.7, 40]}, "class": {"category_id": 3}, "difficult": {"difficult": 0},
                    "crowd": {"iscrowd": 0}}.get(damage, {}))
        content["images"][0]["width"] += damage == "size"
    path.write_text(json.dumps(content))
    refused([path, "b.jpg" if damage == "picture" else "a.jpg", "not those of the xml"],
            lambda: [official_voc.check_json(path, annotations, leave_out_difficult=True)])


DOG = [("dog", (1, 1, 9, 9), 0)]


@pytest.mark.parametrize("content,words", [
    (xml(DOG).replace("</annotation>", ""), ["no valid XML"]), ("", ["no valid XML"]), (b"\xff\xfe\x00", ["no valid XML"]),
    ("<annotation/>", ["no <size><width>"]), (xml(DOG, (0, 48)), ["of 0 × 48 pixels"]),
    (xml(DOG, ("x", 48)), ["'x' where a number"]),
    (xml(DOG, (6.5, 48)), ["of 6.5 × 48 pixels"]), (xml([("Dog", (1, 1, 9, 9), 0)]), ["class 'Dog'", "none of aeroplane"]),
    (xml([("dog", (1, 1, 62, 9), 0)]), ["(1, 1, 62, 9)", "no part of 60 × 48"]), (xml([("dog", (-1, 1, 9, 9), 0)]), ["no part"]),
    (xml([("dog", (9, 1, 8, 9), 0)]), ["no part"]), (xml([("dog", (1, 1, 9, "nan"), 0)]), ["'nan' where a number"]),
    (xml([("dog", (1, 1, 9, ""), 0)]), ["no <bndbox><ymax>"]), (xml([("dog", (1, 1, 9, 9), 2)]), ["difficult = '2'"]),
    ('<?xml version="1.0" encoding="nonsense"?><annotation/>', ["unknown encoding"]),
    ('<!DOCTYPE a [<!ENTITY b "1"><!ENTITY c "&b;&b;">]>' + xml([("dog", (1, 1, 9, "&c;"), 0)]), ["DOCTYPE"]),
    (('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + xml([("&b;", (1, 1, 9, 9), 0)])).encode("utf-16"), ["DOCTYPE"]),
])
def test_a_bad_xml_is_named(voc, content, words):
    path = voc / "VOC2012/Annotations/2008_000002.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused([path, *words], official_voc.detection, voc)
    assert not (voc / "annotations").exists()


@pytest.mark.parametrize("gone,words", [
    (".", ["VOCdevkit: is not there", "host.robots.ox.ac.uk"]),
    ("VOC2007", ["VOC2007/ImageSets/Main/trainval.txt", "VOCtrainval_06-Nov-2007.tar"]),
    ("VOC2007/ImageSets/Main/test.txt", ["test.txt: is not there", "VOCtest_06-Nov-2007.tar"]),
    ("VOC2007/Annotations/000001.xml", ["Annotations/000001.xml is missing", "VOCtest_06-Nov-2007.tar"]),
    ("VOC2007/JPEGImages/000005.jpg", ["JPEGImages/000005.jpg is missing", "VOCtrainval_06-Nov-2007.tar"]),
    ("VOC2012/Annotations", ["VOC2012/Annotations: is not there", "VOCtrainval_11-May-2012.tar"]),
])
def test_what_is_missing_of_voc_is_named(voc, gone, words):
    (voc / gone).rename(voc.parent / "elsewhere")
    refused(words, official_voc.detection, voc)


def test_json_may_be_written_elsewhere_but_not_anywhere(voc, tmp_path):
    refused(["none: no such folder", "--output"], official_voc.detection, voc, tmp_path / "none")
    (tmp_path / "out").mkdir()
    list(official_voc.detection(voc, tmp_path / "out"))
    assert len(list((tmp_path / "out/annotations").iterdir())) == 2 and not (voc / "annotations").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/annotations").write_text("")
    refused(["annotations/instances_trainval0712.json: cannot be written"], official_voc.detection, voc, tmp_path / "taken")
    (voc / "VOC2007/ImageSets/Main/test.txt").write_text("000001\n000001\n")
    refused(["test.txt: lists 000001 twice"], official_voc.detection, voc)
    (voc / "VOC2007/ImageSets/Main/test.txt").write_text("../000001\n")
    refused(["test.txt: should have a name"], official_voc.detection, voc)


# VOC's labels

def test_the_list_of_train_aug(voc):
    said = list(official_voc.segmentation(voc))
    path = voc / "VOC2012/ImageSets/Segmentation/aug.txt"
    assert path.read_text() == "a1\na2\n"  # SegmentationClassAug without train and val
    assert "train_aug: 4 pictures (note: the official number is 10,582)" in said[-1] and said[-1].endswith("written")
    before = files(voc)
    assert list(official_voc.segmentation(voc))[-1].endswith("was there already") and files(voc) == before
    path.unlink()
    path.with_name("trainaug.txt").write_text("a2\nt1\nt2\n")
    list(official_voc.segmentation(voc))
    assert path.read_text() == "a2\n"
    path.write_text("a1\nv1\n")
    refused([path, "v1, which is in val.txt", "delete aug.txt"], official_voc.segmentation, voc)


@pytest.mark.parametrize("gone,words", [
    ("VOC2012/SegmentationClassAug", ["SegmentationClassAug: no such folder", "benchmark.tgz", "--sbd"]),
    ("VOC2012/SegmentationClass/v1.png", ["SegmentationClass/v1.png is missing", "VOCtrainval_11-May-2012.tar"]),
    ("VOC2012/ImageSets/Segmentation/train.txt", ["train.txt: is not there", "VOCtrainval_11-May-2012.tar"]),
    ("VOC2012/JPEGImages/a1.jpg", ["JPEGImages/a1.jpg is missing"]),
])
def test_what_is_missing_for_segmentation_is_named(voc, gone, words):
    (voc / gone).rename(voc.parent / "elsewhere")
    refused(words, official_voc.segmentation, voc)


def test_labels_that_are_none(voc):
    path = voc / "VOC2012/SegmentationClassAug/a2.png"
    save(path, np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    refused([path, "mode RGB", "one channel"], official_voc.segmentation, voc)
    save(path, np.zeros((SIZE[1], SIZE[0] + 1), np.uint8))
    refused([path, "61 × 48", "60 × 48"], official_voc.segmentation, voc)
    path.write_bytes(b"no picture")
    refused([path, "cannot be read as a picture"], official_voc.segmentation, voc)
    for name in ("a1", "a2"):
        (path.parent / f"{name}.png").unlink()
    (voc / "VOC2012/ImageSets/Segmentation/aug.txt").unlink()
    refused(["no labels beyond train.txt and val.txt"], official_voc.segmentation, voc)


def test_labels_are_made_of_sbd(voc, tmp_path):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    augmented, cls = voc / "VOC2012/SegmentationClassAug", tmp_path / "benchmark_RELEASE/dataset/cls"
    wanted = {name: np.asarray(Image.open(augmented / f"{name}.png")) for name in ("a1", "a2")}
    cls.mkdir(parents=True)
    for path in augmented.iterdir():
        path.unlink()
    augmented.rmdir()
    for name, label in {**wanted, "v1": wanted["a1"], "t1": wanted["a1"]}.items():
        savemat(cls / f"{name}.mat", {"GTcls": {"Segmentation": label, "Boundaries": np.zeros(3)}})
    for split, names in (("train", "a1\nv1\n"), ("val", "a2\nt1\n")):
        (cls.parent / f"{split}.txt").write_text(names)
    said = list(official_voc.segmentation(voc, cls.parent.parent, workers=2))
    assert "SBD: 2 pictures beyond train and val, 2 labels to make" in said
    assert {path.stem: np.asarray(Image.open(path)).tolist() for path in augmented.iterdir()} == {
        name: label.tolist() for name, label in wanted.items()}  # none of what is tested on
    (augmented / "a1.png").unlink()
    for content in (b"MATLAB 5.0 MAT-file" + bytes(200), None):
        if content:
            (cls / "a1.mat").write_bytes(content)
        else:
            savemat(cls / "a1.mat", {"GTcls": {"Segmentation": wanted["a1"] + 30}})
        refused([cls / "a1.mat"], official_voc.segmentation, voc, cls.parent.parent)
    assert files(augmented).keys() == {str(augmented / "a2.png")}
    (cls / "a1.mat").unlink()
    refused(["cls/a1.mat is missing", "benchmark.tgz"], official_voc.segmentation, voc, cls.parent.parent)


# COCO

@pytest.fixture
def coco(tmp_path):
    """40 pictures to train on and 2 to test on, one of these without objects; ids are not in order."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 40), ("val2017", 2)):
        images, objects = [], []
        for number in [(7 * n) % count for n in range(count)]:
            photo(root / split / f"{number:012}.jpg", number)
            images.append({"id": number + 100, "file_name": f"{number:012}.jpg", "width": SIZE[0], "height": SIZE[1]})
            for k in range(2 if number or split == "train2017" else 0):
                objects.append({"id": 10 * number + k + 1, "image_id": number + 100, "category_id": 90 - 89 * k, "iscrowd": 0,
                                "bbox": [2, 3, 20.5, 30], "area": 615, "segmentation": [[2, 3, 22.5, 3, 22.5, 33, 2, 33]]})
        categories = [{"id": number, "name": f"class {number}"} for number in (1, 90)]
        content = {"info": {}, "licenses": [], "images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_a_tenth_of_coco_is_the_same_everywhere(coco):
    said = list(official_data.coco(coco))
    path = coco / "annotations/instances_train2017_10pct.json"
    whole, part = (json.loads(file.read_text()) for file in (coco / "annotations/instances_train2017.json", path))
    ids = {image["id"] for image in part["images"]}
    assert part["images"] == [image for image in whole["images"] if image["id"] in ids] and len(ids) == 4
    assert part["annotations"] == [one for one in whole["annotations"] if one["image_id"] in ids]
    assert part["categories"] == whole["categories"] and "seed 0" in part["info"]["description"]
    assert sorted(ids) == [107, 116, 117, 127] and "digest of the ids 92510664; written" in said[-1], (sorted(ids), said)
    before = files(coco)
    assert list(official_data.coco(coco))[-1].endswith("it was there already") and files(coco) == before
    list(official_data.coco(coco, fraction=0.5, seed=3))
    assert len(json.loads((coco / "annotations/instances_train2017_50pct_seed3.json").read_text())["images"]) == 20


def test_the_draw_is_of_the_ids_and_the_seed_alone():
    ids = list(range(0, 600_000, 5))
    drawn = official_data.drawn(ids, 0.1, 0)
    assert len(drawn) == 12_000 and official_data.digest(drawn) == "0aeccb94"
    assert drawn == official_data.drawn(ids[::-1], 0.1, 0) and drawn > official_data.drawn(ids, 0.01, 0)
    other = official_data.drawn(ids, 0.1, 1)
    assert 1000 < len(drawn & other) < 1400  # as of independent draws
    assert abs(np.mean(list(drawn)) - 300_000) < 5000
    assert len(official_data.drawn([5, 7], 0.1, 0)) == 1


@pytest.mark.parametrize("gone,words", [
    (".", ["coco: is not there", "cocodataset.org"]),
    ("annotations/instances_val2017.json", ["instances_val2017.json: is not there", "annotations_trainval2017.zip"]),
    ("train2017", ["train2017: is not there", "train2017.zip"]),
    ("val2017/000000000001.jpg", ["val2017/000000000001.jpg is missing", "val2017.zip"]),
    ("train2017/000000000001.jpg", ["train2017/000000000001.jpg is missing", "train2017.zip"]),
])
def test_what_is_missing_of_coco_is_named(coco, gone, words):
    (coco / gone).rename(coco.parent / "elsewhere")
    refused(words, official_data.coco, coco)


def test_other_json_is_refused(coco):
    path = coco / "annotations/instances_val2017.json"
    for content, words in (("{", ["not valid JSON", "unpack it again"]), ("[]", ['lists "images"']),
                           ('{"images": [1]}', ["lists"]),
                           ('{"images": [{"id": [], "file_name": "a"}], "annotations": []}', ["lists"]),
                           ('{"images": [], "annotations": []}', ['empty list "images"'])):
        path.write_text(content)
        refused([path, *words], official_data.coco, coco)
    (coco / "val2017").rename(coco / "elsewhere")
    (coco / "val2017").write_text("")
    path.write_text('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}')
    refused(["val2017: cannot be read as a folder"], official_data.coco, coco)
    for fraction in (0, 1, -0.5, float("nan")):
        refused(["--fraction", "above 0 and below 1"], official_data.coco, coco, fraction)


# Cityscapes

@pytest.fixture
def cityscapes(tmp_path):
    """Two towns with two pictures each; every id is on the left of each label, a random one on the right."""
    root = tmp_path / "cityscapes"
    for split in ("train", "val"):
        for number in range(4):
            stem = f"{split}/town{number % 2}/town{number % 2}_{number:06}_000019"
            photo(root / f"leftImg8bit/{stem}_leftImg8bit.png", number)
            label = np.random.default_rng(number).integers(0, 34, (SIZE[1], SIZE[0])).astype(np.uint8)
            label[:34, 0] = range(34)
            save(root / f"gtFine/{stem}_gtFine_labelIds.png", label)
    return root


def labels_of(root, kind):
    """{"train/town0/town0_000000_000019": uint8 [H, W]}"""
    paths = root.glob(f"gtFine/*/*/*_gtFine_{kind}.png")
    return {str(path.relative_to(root / "gtFine")).split("_gtFine_")[0]: np.asarray(Image.open(path)) for path in paths}


def test_labels_of_the_19_classes(cityscapes):
    said = list(official_data.cityscapes(cityscapes, workers=2))
    assert said[0] == "train: 4 pictures (note: the official number is 2,975), 4 labels to make"
    assert len(said) == 4 and "all 4 labels are there" in said[3]
    ids, made = labels_of(cityscapes, "labelIds"), labels_of(cityscapes, "labelTrainIds")
    assert ids.keys() == made.keys() and len(made) == 8
    # written out, from cityscapesScripts' table of labels
    table = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
    assert all((np.array(table)[ids[name]] == label).all() and label.dtype == np.uint8 for name, label in made.items())
    before = files(cityscapes)
    assert "0 labels to make" in next(official_data.cityscapes(cityscapes)) and files(cityscapes) == before
    lost = min(path for path in before if path.endswith("labelTrainIds.png"))
    os.unlink(lost)
    assert "1 labels to make" in next(iter(list(official_data.cityscapes(cityscapes))))
    after = files(cityscapes)
    assert after[lost][0] == before[lost][0] and {**after, lost: before[lost]} == before
    for path in cityscapes.rglob("*labelIds.png"):  # not needed any more
        path.unlink()
    assert len(list(official_data.cityscapes(cityscapes))) == 4


@pytest.mark.parametrize("gone,words", [
    (".", ["cityscapes: is not there", "cityscapes-dataset.com"]),
    ("gtFine", ["gtFine/train: is not there", "gtFine_trainvaltest.zip"]),
    ("leftImg8bit/val", ["leftImg8bit/val: is not there", "leftImg8bit_trainvaltest.zip"]),
    ("gtFine/train/town1/town1_000001_000019_gtFine_labelIds.png",
     ["gtFine/train: town1/town1_000001_000019 has a picture but no label (1 in all)", "gtFine_trainvaltest.zip"]),
    ("leftImg8bit/val/town0", ["leftImg8bit/val: town0/town0_000000_000019 has a label but no picture (2 in all)"]),
])
def test_what_is_missing_of_cityscapes_is_named(cityscapes, gone, words):
    (cityscapes / gone).rename(cityscapes.parent / "elsewhere")
    refused(words, official_data.cityscapes, cityscapes)


def test_labels_that_are_none_of_cityscapes(cityscapes):
    path = cityscapes / "gtFine/val/town0/town0_000002_000019_gtFine_labelIds.png"
    for pixels, words in ((np.full((SIZE[1], SIZE[0]), 34, np.uint8), ["has the id 34", "0 to 33"]),
                          (np.zeros((SIZE[1], SIZE[0], 3), np.uint8), ["mode RGB"])):
        save(path, pixels)
        refused([path, *words], official_data.cityscapes, cityscapes, workers=2)
    save(path, np.random.default_rng(0).integers(0, 34, (SIZE[1], SIZE[0])).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:1000])
    refused([path, "cannot be read"], official_data.cityscapes, cityscapes)
    save(path, np.zeros((9, 9), np.uint8))
    refused(["town0_000002_000019_gtFine_labelTrainIds.png", "9 × 9"], official_data.cityscapes, cityscapes)
    assert not [path for path in cityscapes.rglob("*") if "tmp" in path.name]


# The tool

def test_the_tool(voc, coco, cityscapes, run_tool):
    for kind, root, ends in (("voc", voc, ["was there already", "written"]), ("coco", coco, ["written"]),
                             ("cityscapes", cityscapes, ["as large as their pictures"])):
        result = run_tool("prepare_data.py", kind, "--root", root)
        assert result.returncode == 0 and result.stderr == "" and result.stdout.strip().endswith(ends[-1]), result
    (voc / "VOC2012/SegmentationClassAug").rename(voc / "elsewhere")
    result = run_tool("prepare_data.py", "voc", "--root", voc)
    assert result.returncode == 1 and "trainval0712.json: 3 pictures" in result.stdout  # the boxes are there all the same
    assert re.fullmatch(r"error: \S+/SegmentationClassAug: no such folder; .*\n", result.stderr), result
    assert run_tool("prepare_data.py", "voc", "--root", voc, "--task", "detection").returncode == 0
    for wrong in (["voc"], [], ["cityscapes", "--root", ".", "--workers", "0"], ["coco", "--root", ".", "--output", "."]):
        assert run_tool("prepare_data.py", *wrong).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_goes_on(cityscapes, number):
    """With 80 large labels more: the processes end with the tool, and the next run makes what is missing."""
    label = np.kron(np.random.default_rng(0).integers(0, 34, (128, 256)), np.ones((4, 4))).astype(np.uint8)
    for part, pixels in (("leftImg8bit/train/town0/town0_{:06}_000019_leftImg8bit.png", np.zeros((*label.shape, 3), np.uint8)),
                         ("gtFine/train/town0/town0_{:06}_000019_gtFine_labelIds.png", label)):
        save(cityscapes / part.format(100), pixels)
        for more in range(101, 180):
            os.link(cityscapes / part.format(100), cityscapes / part.format(more))
    command = [sys.executable, "tools/prepare_data.py", "cityscapes", "--root", str(cityscapes), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(cityscapes.glob("gtFine/*/*/*_labelTrainIds.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    os.kill(process.pid, number)
    stderr = process.communicate(timeout=30)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 143 and stderr == "interrupted; the same command goes on where it was\n", stderr
    assert len(workers) == 2
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive the tool"
        time.sleep(0.02)
    made = len(labels_of(cityscapes, "labelTrainIds"))
    assert 2 <= made < 84
    assert f"{84 - made} labels to make" in list(official_data.cityscapes(cityscapes, workers=2))[0]
    assert len(labels_of(cityscapes, "labelTrainIds")) == 88


# The configs read what was written

@pytest.mark.parametrize("config", ["fcn_r50-d8_voc12aug_20k", "fcn_r50-d8_cityscapes_40k_769"])
def test_segmentation_configs_read_it(config, request):
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    from paddleseg.cvlibs import SegBuilder

    from ppdensecl.interop import paddleseg as seg

    root = request.getfixturevalue("voc" if "voc" in config else "cityscapes")
    list(official_voc.segmentation(root) if "voc" in config else official_data.cityscapes(root))
    builder = SegBuilder(seg.read_config(ROOT / f"configs/seg/{config}.yml", root))
    train, val = builder.train_dataset, builder.val_dataset
    assert (len(train), len(val)) == ((4, 1) if "voc" in config else (4, 4))
    for picture, label in train.file_list + val.file_list:
        assert Path(picture).name.replace("_leftImg8bit.png", "").replace(".jpg", "") in label
    crop = 512 if "voc" in config else 769
    sample = train[0]
    assert sample["img"].shape == (3, crop, crop) and sample["label"].shape == (crop, crop)
    assert set(np.unique(sample["label"])) <= {*range(21 if "voc" in config else 19), 255}
    assert val[0]["label"].shape[-2:] == SIZE[::-1]


@pytest.mark.parametrize("config", ["faster_rcnn_r50_c4_voc_24k", "mask_rcnn_r50_fpn_coco10pct"])
def test_detection_configs_read_it(config, request, tmp_path):
    pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
    from ppdet.core.workspace import create

    from ppdensecl.interop import paddledet as det

    root = request.getfixturevalue("voc" if "voc" in config else "coco")
    list(official_voc.detection(root) if "voc" in config else official_data.coco(root))
    options = [f"{part}.dataset_dir={root}" for part in ("TrainDataset", "EvalDataset", "TestDataset")]
    det.read_config(ROOT / f"configs/det/{config}.yml", [*options, "total_batch_size=2", f"save_dir={tmp_path}"])
    train, test = create("TrainDataset")(), create("EvalDataset")()
    batch = next(iter(create("TrainReader")(train, 0)))
    assert len(batch["image"]) == 2 and len(train) == (3 if "voc" in config else 4)
    test.parse_dataset()
    assert len(test) == (3 if "voc" in config else 2)  # those without objects to find as well
    by_name = {Path(record["im_file"]).name: record for record in train.roidbs}
    if "voc" in config:
        record = by_name["000005.jpg"]
        assert record["gt_bbox"].tolist() == [[0, 0, 60, 48], [4, 6, 20, 31]] and record["gt_class"].ravel().tolist() == [8, 14]
        assert train.catid2clsid[20] == 19 and cv2.imread(record["im_file"]).shape == (48, 60, 3)
    else:
        assert sorted(by_name) == [f"{number - 100:012}.jpg" for number in (107, 116, 117, 127)]
        assert len(batch["gt_poly"]) == 2 and train.cname2cid == {"class 1": 0, "class 90": 1}
