"""Fine-tuning in PaddleDetection: names, the proof of loading, the repairs, and whole runs on tiny generated data.

The slow ones: 2 to 16 s each, a minute and a half in all (2 cores)."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
import paddle  # noqa: E402

from ppdensecl.data import labelled_scenes  # noqa: E402
from ppdensecl.data.synthetic import CLASSES, SyntheticSource  # noqa: E402
from ppdensecl.engine import checkpoint  # noqa: E402
from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.evaluation.voc07 import average_precision  # noqa: E402
from ppdensecl.interop import finetune, paddledet as det, paddledet_backbone as paddledet, precise_bn  # noqa: E402
from ppdensecl.interop.paddledet_components import IterationSteps  # noqa: E402
from ppdensecl.interop.paddledet_config import read_config  # noqa: E402
from ppdensecl.models import ResNet  # noqa: E402
from conftest import ROOT  # noqa: E402

BCCD = "configs/det/faster_rcnn_r18_bccd.yml"
FEW = ["RPNHead.train_proposal.pre_nms_top_n=200", "RPNHead.train_proposal.post_nms_top_n=50",
       "BBoxAssigner.batch_size_per_im=16", "RPNHead.test_proposal.pre_nms_top_n=50", "RPNHead.test_proposal.post_nms_top_n=20"]
SMALL = [*FEW, "XConvNormHead.out_channel=32", "XConvNormHead.conv_dim=32", "FPN.out_channel=32"]


def backbone_arrays(depth, seed=0):
    """A ResNet's arrays with running statistics that are not the initial ones."""
    paddle.seed(seed)
    generator = np.random.default_rng(seed)
    model = ResNet(depth)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, array in arrays.items():
        if name.endswith("_mean"):
            arrays[name] = generator.normal(0, 0.1, array.shape).astype(np.float32)
        elif name.endswith("_variance"):
            arrays[name] = generator.uniform(0.5, 2, array.shape).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """backbone_file(depth) → (path, our arrays); made once."""
    made = {}

    def make(depth):
        if depth not in made:
            path, arrays = tmp_path_factory.mktemp("backbone") / f"r{depth}.pdparams", backbone_arrays(depth)
            checkpoint.write_arrays(path, paddledet.export(arrays, depth))
            made[depth] = str(path), arrays
        return made[depth]

    return make


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"))


def scenes(root):
    """Four synthetic scenes as COCO: -o settings of the data; boxes and masks."""
    labelled_scenes.write(SyntheticSource(4, size=(96, 128)), root, "boxes")
    settings = ["num_classes=8", "worker_num=0", "log_iter=1", "norm_type=bn", "total_batch_size=2",
                f"TestDataset.dataset_dir={root}", "TestDataset.anno_path=boxes.json"]
    for part in ("TrainDataset", "EvalDataset"):
        settings += [f"{part}.dataset_dir={root}", f"{part}.image_dir=images", f"{part}.anno_path=boxes.json"]
    return settings


def schedule(milestone):
    return f"LearningRate.schedulers=[!IterationSteps {{milestones: [{milestone}], warmup: 2}}]"


def written(result):
    return result.stdout + result.stderr


@pytest.mark.parametrize("depth,count", [(18, 100), (34, 180), (50, 265), (101, 520)])
def test_names_are_all_of_both_networks(depth, count):
    ours = {name: list(value.shape) for name, value in ResNet(depth).state_dict().items()}
    theirs = paddledet.TheirResNet(depth=depth, variant="b", freeze_at=-1, freeze_norm=False).state_dict()
    names = paddledet.names(depth)
    assert names.keys() == ours.keys() and len(names) == len(set(names.values())) == count
    extra = {name for name in theirs if name.startswith(paddledet.SHORT)} if depth < 50 else set()
    assert set(names.values()) | extra == theirs.keys() and len(extra) == (5 if depth < 50 else 0)
    assert all(list(theirs[new].shape) == ours[old] for old, new in names.items())


def test_files_that_load_in_part_are_refused(backbone_file, tmp_path):
    _, arrays = backbone_file(18)
    good = paddledet.export(arrays, 18)
    bad = {"missing": {name: value for name, value in good.items() if name != "res5.res5b.branch2b.norm._mean"},
           "torchvision": arrays, "identity": {paddledet.names(18)[name]: value for name, value in arrays.items()},
           "deeper": paddledet.export(backbone_file(34)[1], 34),
           "shape": {**good, "conv1.conv1.norm.bias": np.zeros(8, np.float32)}}
    for name, content in bad.items():
        path = tmp_path / f"{name}.pdparams"
        checkpoint.write_arrays(path, content)
        with pytest.raises(UserError, match=r"\d+ of the 105 tensors of the model's backbone would be loaded"):
            paddledet.load(paddledet.TheirResNet(depth=18, variant="b", freeze_at=-1, freeze_norm=False), str(path))


def test_other_features_are_seen_before_the_file_is_there(tmp_path, monkeypatch):
    """Under the same names and in the same shapes: two biases exchanged, then the stride in the 1×1 convolution."""
    arrays, right, theirs = backbone_arrays(50), paddledet.names(50), paddledet.TheirResNet
    a, b = "layer4.1.bn3.bias", "layer4.2.bn3.bias"
    arrays[b] = arrays[b] + 1
    checkpoint.write_arrays(tmp_path / "b.pdparams", arrays)

    def exported():
        with pytest.raises(UserError, match="feature maps differ by"):
            finetune.export(str(tmp_path / "b.pdparams"), tmp_path / "det.pdparams", "paddledet")

    monkeypatch.setattr(paddledet, "names", lambda depth: {**right, a: right[b], b: right[a]})
    exported()
    monkeypatch.setattr(paddledet, "names", lambda depth: right)
    monkeypatch.setattr(paddledet, "check_variant", lambda model: None)
    original = theirs.__init__
    monkeypatch.setattr(theirs, "__init__", lambda self, variant, **options: original(self, variant="a", **options))
    exported()
    assert [file.name for file in tmp_path.iterdir()] == ["b.pdparams"]


def test_a_model_of_variant_a_is_refused(backbone_file):
    path, _ = backbone_file(18)
    with pytest.raises(UserError, match="variant a"):
        paddledet.load(paddledet.TheirResNet(depth=18, variant="a"), path)


def test_steps_are_where_the_recipe_says():
    rate = IterationSteps([6, 8], warmup=3, start_factor=0.1)(1.0)
    rates = []
    for _ in range(10):
        rates.append(rate())
        rate.step()
    assert np.allclose(rates, [0.1, 0.4, 0.7, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_repairs_say_so_and_are_for_one_version_only():
    code = """
from ppdensecl.interop import paddledet_repairs as paddledet
import paddle, ppdet
concat = paddle.concat
ppdet.__version__ = "2.7.0"
paddledet.repair()
assert paddle.concat is concat
ppdet.__version__ = "2.6.0"
paddledet.repair()
repaired = paddle.concat
assert repaired is not concat and repaired.__wrapped__ is concat and repaired.__name__ == "concat"
assert repaired([paddle.to_tensor(3), paddle.to_tensor([4, 5])]).tolist() == [3, 4, 5]
assert repaired(x=[paddle.ones([2, 1]), paddle.zeros([2, 2])], axis=-1).shape == [2, 3]
paddledet.repair()
assert paddle.concat is repaired
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "knows 2.6.0, and repairs nothing" in written(result) and written(result).count("lets paddle.concat take 0-d") == 1


def test_the_papers_detection_has_precise_bn():
    config = yaml.safe_load((ROOT / "configs/det/faster_rcnn_r50_c4_voc_24k.yml").read_text())
    assert config["precise_bn"] == precise_bn.BATCHES == 200


RUN = "!!python/object/apply:os.mkdir [{}]"


@pytest.mark.parametrize("where", ["option", "file", "base"])
@pytest.mark.parametrize("text", [RUN, "{{a: [!Callable {{full_type: os.mkdir, args: [{}]}}]}}"])
def test_a_config_cannot_run_code(tmp_path, where, text):
    made, value = tmp_path / "made", f"save_dir: {text.format(tmp_path / 'made')}\n"
    first, second = tmp_path / "first.yml", tmp_path / "second.yml"
    first.write_text(value if where == "file" else "_BASE_: [second.yml]\n")
    second.write_text(value if where == "base" else f"save_dir: {tmp_path}\n")
    options = [value.strip().replace(": ", "=", 1)] if where == "option" else []
    with pytest.raises(UserError, match=r"(os\.mkdir|!Callable).*nothing was run") as raised:
        read_config(first, options)
    named = {"option": "-o save_dir=", "file": str(first), "base": str(second)}[where]
    assert str(raised.value).startswith(named) and "\n" not in str(raised.value) and not made.exists()


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Maker:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    model = paddle.nn.Linear(2, 3)
    arrays = {name: value.numpy() + 1 for name, value in model.state_dict().items()}
    checkpoint.write_arrays(tmp_path / "good.pdparams", arrays)
    for name in ("bad.pdparams", "good.pdopt"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Maker()}))
    with pytest.raises(UserError, match="bad.pdparams: asks for .*refused, nothing was run"):
        det._whole(model, tmp_path / "bad.pdparams")
    with pytest.raises(UserError, match="good.pdopt: asks for .*refused, nothing was run"):
        det._resume(SimpleNamespace(model=model), tmp_path / "good")
    assert not (tmp_path / "made").exists()
    assert all((value.numpy() == arrays[name]).all() for name, value in model.state_dict().items())


def test_trains_evaluates_saves_and_resumes(run_tool, coco, backbone_file, tmp_path):
    path, _ = backbone_file(18)
    common = ["finetune_det.py", "-c", BCCD]
    options = ["-o", *coco, *SMALL, f"save_dir={tmp_path}", schedule(3), "BBoxPostProcess.nms.score_threshold=0.0"]
    result = run_tool(*common, "train", *options, f"pretrain_weights={path}", "iterations=2")
    assert result.returncode == 0, written(result)
    assert "105/105 tensors" in written(result)
    assert re.search(r"bbox: AP \d+\.\d\d, AP50 \d+\.\d\d, AP75 \d", result.stdout), written(result)
    folder = tmp_path / "faster_rcnn_r18_bccd"
    first = paddle.load(str(folder / "model_final.pdparams"))
    assert paddle.load(str(folder / "model_final.pdopt"))["LR_Scheduler"]["last_epoch"] == 2
    assert any((folder / "vdl").iterdir())

    truth = half_of_what_was_found(coco, folder / "bbox.json")
    result = run_tool(*common, "eval", *options, f"weights={folder / 'model_final.pdparams'}", "voc07=true",
                      f"EvalDataset.anno_path={truth.name}")
    assert result.returncode == 0 and "bbox: AP " in result.stdout, written(result)
    each = average_precision(json.loads(truth.read_text())["annotations"], json.loads((folder / "bbox.json").read_text()))
    shown = re.search(r"bbox as VOC 2007 counts: AP ([\d.]+), AP50 ([\d.]+), AP75 ([\d.]+)", result.stdout).groups()
    assert shown == tuple(f"{100 * ap:.2f}" for ap in (sum(each.values()) / 10, each[50], each[75]))
    assert each[50] > each[75] > 0

    result = run_tool(*common, "train", *options, "iterations=3", "validate=false", "precise_bn=3",
                      "--resume", folder / "model_final")
    assert result.returncode == 0, written(result)
    log = written(result)
    assert re.search(r"statistics of (\d+) of \1 BatchNorms estimated from 3 batches[^$]*Save checkpoint", log), log
    optimizer, second = paddle.load(str(folder / "model_final.pdopt")), paddle.load(str(folder / "model_final.pdparams"))
    assert optimizer["LR_Scheduler"]["last_epoch"] == 3 and optimizer["last_epoch"] == 2  # one more, of an epoch of two
    assert any((first[name] != second[name]).any() for name in first)


def half_of_what_was_found(coco, found):
    """An annotation file whose objects are every second detection, by turns as wide and 0.7 as wide: what two steps taught
    detects none of the real ones on some CPUs."""
    root = Path(next(item.partition("=")[2] for item in coco if "EvalDataset.dataset_dir" in item))
    truth, boxes = json.loads((root / "boxes.json").read_text()), json.loads(found.read_text())[::2]
    truth["annotations"] = []
    for number, box in enumerate(boxes, start=1):
        x, y, width, height = box["bbox"]
        width *= 0.7 if number % 2 else 1
        truth["annotations"].append({"id": number, "image_id": box["image_id"], "category_id": box["category_id"], "iscrowd": 0,
                                     "bbox": [x, y, width, height], "area": width * height})
    (root / "found.json").write_text(json.dumps(truth))
    return root / "found.json"


@pytest.mark.slow
def test_a_seed_repeats_a_run(run_tool, coco, tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = run_tool("finetune_det.py", "-c", BCCD, "train", "-o", *coco, *SMALL, f"save_dir={tmp_path / name}", schedule(3),
                          "iterations=2", "validate=false", f"seed={seed}")
        assert result.returncode == 0, written(result)
        found = checkpoint.read_arrays(tmp_path / name / "faster_rcnn_r18_bccd/model_final.pdparams")
        weights.append(np.concatenate([found[key].ravel() for key in sorted(found)]))
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


UNFIT = {"of the 105 tensors of the model's backbone": "pretrain_weights={other}", "fewer than one batch": "total_batch_size=5",
         "nowhere/voc/images: no such file or folder": "EvalDataset.dataset_dir=nowhere/voc", "expected KEY=VALUE": "epoch",
         "8 categories, but 'num_classes' is 80; set num_classes=8": "num_classes=80"}


@pytest.mark.parametrize("words", [next(iter(UNFIT)), *(pytest.param(words, marks=pytest.mark.slow) for words in [*UNFIT][1:])])
def test_a_run_with_unfit_settings_ends_in_one_sentence(run_tool, coco, backbone_file, tmp_path, words):
    setting = UNFIT[words].format(other=backbone_file(34)[0])
    result = run_tool("finetune_det.py", "-c", BCCD, "train", "-o", *coco, *SMALL, f"save_dir={tmp_path}", setting)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in written(result), written(result)


def detect(folder, inputs):
    """Lets Paddle Inference run an exported detector; returns its outputs."""
    from paddle import inference

    program = next(path for path in (folder / "model.json", folder / "model.pdmodel") if path.is_file())
    config = inference.Config(str(program), str(folder / "model.pdiparams"))
    config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(inputs[name])
    predictor.run()
    return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]


@pytest.mark.slow
def test_an_exported_detector_finds_what_the_trained_one_does(run_tool, coco, tmp_path):
    """The same boxes from Paddle Inference as from PaddleDetection's own evaluation, on one scene in its own size."""
    options = ["-o", *coco, *SMALL, f"save_dir={tmp_path}", "BBoxPostProcess.nms.score_threshold=0.0"]
    result = run_tool("finetune_det.py", "-c", BCCD, "train", *options, schedule(3), "iterations=2", "validate=false")
    assert result.returncode == 0, written(result)
    weights = f"weights={tmp_path}/faster_rcnn_r18_bccd/model_final.pdparams"
    result = run_tool("finetune_det.py", "-c", BCCD, "export", "--out", tmp_path / "deploy", *options, weights,
                      "TestDataset.dataset_dir=nowhere")
    assert result.returncode == 0, written(result)
    result = run_tool("finetune_det.py", "-c", BCCD, "eval", *options, weights)
    assert result.returncode == 0, written(result)
    folder = tmp_path / "deploy" / "faster_rcnn_r18_bccd"
    names = yaml.safe_load((folder / "infer_cfg.yml").read_text())["label_list"]
    assert names == list(CLASSES)  # of the evaluation's json, whatever TestDataset says
    sample = {"image": SyntheticSource(4, size=(96, 128)).scene(0).picture, "im_shape": np.array([96, 128], np.float32),
              "scale_factor": np.ones(2, np.float32)}
    from ppdet.data.transform import operators

    for step in (operators.Resize(target_size=[320, 512], interp=1, keep_ratio=True), operators.NormalizeImage(),
                 operators.Permute()):
        sample = step.apply(sample)
    _, h, w = sample["image"].shape
    sample["image"] = np.pad(sample["image"], [(0, 0), (0, -h % 32), (0, -w % 32)])
    boxes = detect(folder, {name: sample[name][None].astype(np.float32) for name in ("image", "im_shape", "scale_factor")})[0]
    boxes = boxes[boxes[:, 1] > 0]  # without the one made-up box that this form adds
    found = [box for box in json.loads((tmp_path / "faster_rcnn_r18_bccd" / "bbox.json").read_text()) if box["image_id"] == 1]
    found = np.array([[box["category_id"] - 1, box["score"], *box["bbox"]] for box in found])
    found[:, 4:] += found[:, 2:4]  # x, y, w, h → corners
    assert abs(len(found) - len(boxes)) <= 3  # of some hundred, one or two are near the threshold of the suppression
    for row in found[np.argsort(-found[:, 1])][:10]:
        assert (np.abs(boxes - row) < [0.5, 1e-4, 0.02, 0.02, 0.02, 0.02]).all(1).any(), row


@pytest.mark.slow
def test_c4_with_the_extra_norm_loads_whole_and_trains(run_tool, coco, backbone_file, tmp_path):
    path, _ = backbone_file(50)
    few = [*FEW, "TrainReader.sample_transforms=[Decode: {}, Permute: {}]"]
    result = run_tool("finetune_det.py", "-c", "configs/det/faster_rcnn_r50_c4_voc_24k.yml", "train", "-o", *coco, *few,
                      schedule(3), f"save_dir={tmp_path}", "iterations=2", "validate=false", "precise_bn=1",
                      f"pretrain_weights={path}", timeout=500)
    assert result.returncode == 0 and "265/265 tensors" in written(result), written(result)
    assert re.search(r"statistics of (\d+) of \1 BatchNorms estimated from 1 batches", written(result)), written(result)
    weights = paddle.load(f"{tmp_path}/faster_rcnn_r50_c4_voc_24k/model_final.pdparams")
    before = paddle.load(path)
    assert weights["bbox_head.head.norm.weight"].shape == [2048] and (weights["bbox_head.head.norm._mean"] != 0).any()
    for name, value in before.items():  # nothing is frozen: not the stem, no norm, nothing of res5
        now = weights[("bbox_head.head." if name.startswith("res5") else "backbone.") + name].numpy()
        assert (now != np.asarray(value)).any(), name


@pytest.mark.slow
def test_mask_rcnn_trains_on_the_synthetic_masks(run_tool, coco, backbone_file, tmp_path):
    path, _ = backbone_file(50)
    few = [*SMALL, "FPN.norm_type=bn", "MaskFeatNorm.out_channel=32", "MaskFeatNorm.num_convs=2", "XConvNormHead.num_convs=1"]
    few += [f"{part}.sample_transforms=[Decode: {{}}, Permute: {{}}]" for part in ("TrainReader", "EvalReader")]
    result = run_tool("finetune_det.py", "-c", "configs/det/mask_rcnn_r50_fpn_coco_1x.yml", "train", "-o", *coco, *few,
                      schedule(3), f"save_dir={tmp_path}", "iterations=2", f"pretrain_weights={path}", timeout=500)
    assert result.returncode == 0 and "265/265 tensors" in written(result), written(result)
    losses = [float(loss) for loss in re.findall(r"loss_mask: ([\d.]+)", written(result))]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
    weights = paddle.load(f"{tmp_path}/mask_rcnn_r50_fpn_coco_1x/model_final.pdparams")
    norms = [name for name in weights if name.startswith("mask_head") and name.endswith("_mean")]
    assert len(norms) == 2 and all((weights[name] != 0).any() for name in norms)
    for part in ("neck", "bbox_head"):
        assert any(name.startswith(part) and name.endswith("_mean") for name in weights)


@pytest.mark.slow
def test_blood_cells(run_tool, data_folder, tmp_path):
    root = data_folder / "bccd_voc"
    options = ["-o", *FEW, f"save_dir={tmp_path}", "worker_num=0", "TrainDataset.sample_num=8", "EvalDataset.sample_num=4",
               f"TestDataset.dataset_dir={root}", f"TrainDataset.dataset_dir={root}", f"EvalDataset.dataset_dir={root}",
               schedule(100), "LearningRate.base_lr=0.002", "iterations=8", "total_batch_size=2", "snapshot_epoch=10"]
    result = run_tool("finetune_det.py", "-c", BCCD, "train", *options, timeout=550)
    assert result.returncode == 0 and "bbox: AP " in result.stdout, written(result)
    print(result.stdout[-60:])
