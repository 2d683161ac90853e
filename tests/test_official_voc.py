"""VOC as it is downloaded: boxes as COCO json, lists and labels of train_aug, and what is missing."""

import json

import numpy as np
import pytest
from PIL import Image

from ppdensecl.interop import official_voc
from test_official_data import SIZE, files, photo, refused, save


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
