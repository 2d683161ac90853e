"""Synthetic scenes as files: what COCO's and PaddleSeg's readers find in them is what the scenes hold."""

import json

import cv2
import numpy as np
from PIL import Image

from ppdensecl.data.synthetic import CLASSES, SyntheticSource


def test_files_hold_the_scenes(run_tool, tmp_path):
    command = ["prepare_data.py", "synthetic", "--output", tmp_path / "s", "--train", "3", "--test", "2", "--size", "64", "96"]
    result = run_tool(*command)
    assert result.returncode == 0 and "test.json, test.txt: 2 scenes" in result.stdout, result.stderr
    for part, seed, count in (("train", 0, 3), ("test", 1, 2)):
        source, found = SyntheticSource(count, seed, (64, 96)), json.loads((tmp_path / "s" / f"{part}.json").read_text())
        assert [one["name"] for one in found["categories"]] == list(CLASSES) and len(found["images"]) == count
        lines = (tmp_path / "s" / f"{part}.txt").read_text().splitlines()
        for i, image in enumerate(found["images"]):
            scene = source.scene(i)
            picture, label = (np.asarray(Image.open(tmp_path / "s" / path)) for path in lines[i].split())
            assert lines[i] == f"images/{image['file_name']} labels/{image['file_name']}"
            assert (picture == scene.picture).all() and (label == scene.mask).all()
            objects = [one for one in found["annotations"] if one["image_id"] == image["id"]]
            assert [one["category_id"] for one in objects] == scene.classes.tolist()
            for number, one in enumerate(objects, 1):
                x, y, w, h = one["bbox"]
                assert [x, y, x + w, y + h] == scene.boxes[number - 1].tolist()
                outline = np.zeros(scene.mask.shape, np.uint8)
                for polygon in one["segmentation"]:
                    cv2.fillPoly(outline, [np.array(polygon, np.int32).reshape(-1, 2)], 1)
                visible = scene.instances == number
                assert one["area"] == visible.sum() and (outline[visible].mean() > 0.98)
    assert run_tool(*command[:-2], "8", "96").returncode == 2
    (tmp_path / "file").write_text("")
    result = run_tool("prepare_data.py", "synthetic", "--output", tmp_path / "file")
    assert result.returncode == 1 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
