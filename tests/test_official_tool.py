"""tools/prepare_data.py voc|coco|cityscapes as a process, and the fine-tuning configs that read what it writes."""

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

from conftest import ROOT
from ppdensecl.interop import official_data, official_voc
from test_official_data import SIZE, cityscapes, coco, labels_of, save  # noqa: F401 (fixtures too)
from test_official_voc import voc  # noqa: F401 (a fixture)
from test_prepare_data import alive, children


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
