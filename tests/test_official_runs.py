"""The paper's detection configs in their own size, from the official folders to an evaluated detector, two iterations each.

Pictures are tiny and proposals few; networks, data layout, normalisation and schedule are the configs' own. 7 to 14 s each (2 cores).
The segmentation configs: test_finetune_seg.py.
"""

import re

import numpy as np
import pytest

pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
from conftest import ROOT  # noqa: E402
from ppdensecl.engine import checkpoint  # noqa: E402
from test_finetune_det import FEW, backbone_file, written  # noqa: E402,F401 (a fixture)
from test_official_data import coco  # noqa: E402,F401 (a fixture)
from test_official_voc import voc  # noqa: E402,F401 (a fixture)

CONFIGS = sorted(path for path in (ROOT / "configs/det").glob("*.yml") if not path.stem.endswith("_cpu") and "bccd" not in path.stem)
SMALL = "[Decode: {}, Resize: {interp: 1, target_size: [96, 160], keep_ratio: true}, " \
        "NormalizeImage: {is_scale: true, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}, Permute: {}]"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_detection_configs_train_on_their_layouts(run_tool, backbone_file, request, tmp_path, path):  # noqa: F811
    kind = "voc" if "voc" in path.stem else "coco"
    root, depth = request.getfixturevalue(kind), int(re.search(r"r(\d+)", path.stem).group(1))
    more = ["--task", "detection"] if kind == "voc" else []
    result = run_tool("prepare_data.py", kind, "--root", root, *more)
    assert result.returncode == 0, written(result)
    weights, arrays = backbone_file(depth)
    options = [f"{part}.dataset_dir={root}" for part in ("TrainDataset", "EvalDataset", "TestDataset")] + FEW + [
        f"{part}.sample_transforms={SMALL}" for part in ("TrainReader", "EvalReader")] + [
        "precise_bn=1" if kind == "voc" else "num_classes=2"]
    result = run_tool("finetune_det.py", "-c", path, "train", "-o", *options, "total_batch_size=2", "iterations=2", "worker_num=0",
                      "log_iter=1", f"save_dir={tmp_path / 'out'}", f"pretrain_weights={weights}", timeout=900)
    shown = written(result)
    assert result.returncode == 0, shown
    assert f"{len(arrays)}/{len(arrays)} tensors of the backbone loaded" in shown
    assert ("precise BN: statistics of" in shown) == (kind == "voc")
    assert re.search(r"bbox: AP \d+\.\d\d", shown)
    found = checkpoint.read_arrays(tmp_path / "out" / path.stem / "model_final.pdparams")
    assert all(np.isfinite(array).all() for array in found.values())
    heads = {"extra norm": "bbox_head.head.norm._mean" in found, "mask": any(name.startswith("mask_head") for name in found)}
    assert heads == {"extra norm": kind == "voc", "mask": kind == "coco"}
