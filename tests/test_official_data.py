"""COCO and Cityscapes as they are downloaded: what is written, and what is missing."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from ppdensecl.errors import UserError
from ppdensecl.interop import official_data

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
