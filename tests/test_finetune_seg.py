"""Fine-tuning with PaddleSeg: the configs, then the tool from training to Paddle Inference.

The slow ones, the large configs: 6 to 12 s each (2 cores)."""

import os
import pickle
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from PIL import Image

pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")

from paddleseg.cvlibs import SegBuilder  # noqa: E402

from ppdensecl.engine import checkpoint  # noqa: E402
from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.evaluation import dense  # noqa: E402
from ppdensecl.interop import paddleseg as seg, paddleseg_components as components  # noqa: E402
from ppdensecl.models import ResNet  # noqa: E402
from test_export_finetune import refused, written  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs/seg").glob("*.yml") if not path.stem.endswith("_cpu"))
CAMVID = "configs/seg/fcn_r18_camvid.yml"


# The configs

@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_have_the_papers_numbers(path):
    config = seg.read_config(path)
    dic, cityscapes = config.dic, "cityscapes" in path.stem
    assert dic["model"]["backbone"]["type"] == "DenseCLResNet" + re.search(r"r(\d+)", path.stem).group(1)
    assert dic["model"]["backbone"]["output_stride"] == 8 and dic["model"]["backbone"]["pretrained"] is None
    assert dic["loss"]["coef"] == [1, 0.4] and [one["type"] for one in dic["loss"]["types"]] == ["PixelCrossEntropy"] * 2
    assert dic["lr_scheduler"] == {"type": "PolynomialDecay", "learning_rate": 0.01, "end_lr": 1e-4, "power": 0.9}
    assert dic["optimizer"] == {"type": "SGD", "momentum": 0.9, "weight_decay": 5e-4}
    crop = next(one for one in dic["train_dataset"]["transforms"] if one["type"] == "BalancedCrop")["crop_size"]
    if "camvid" not in path.stem:
        assert (config.batch_size, config.iters, crop) == (4, 40000 if cityscapes else 20000, [769 if cityscapes else 512] * 2)
        assert dic["train_dataset"]["mode"] == "train" if cityscapes else "trainaug" and dic["val_dataset"]["mode"] == "val"
    assert dic.get("test_config") == ({"is_slide": True, "crop_size": [769] * 2, "stride": [513] * 2} if cityscapes else None)
    assert dic["model"]["align_corners"] == cityscapes  # as mmsegmentation for odd sizes


def test_read_config_changes_what_is_asked(tmp_path):
    config = seg.read_config(ROOT / CAMVID, "/pictures", "/b.pdparams", iters=7, opts=["lr_scheduler.power=1.0"])
    assert config.dic["train_dataset"]["train_path"] == "/pictures/train.txt" and config.iters == 7
    assert config.dic["val_dataset"]["val_path"] == "/pictures/test.txt" and config.dic["lr_scheduler"]["power"] == 1
    assert config.model_cfg["backbone"]["pretrained"] == "/b.pdparams"
    config = seg.read_config(ROOT / CAMVID, "/pictures", opts=["train_dataset.train_path=/some/where/else.txt"])
    assert config.dic["train_dataset"]["train_path"] == "/some/where/else.txt"
    (tmp_path / "a.yml").write_text("iters: [")
    for path in (tmp_path / "none.yml", tmp_path / "a.yml", ROOT / "README.md"):
        with pytest.raises(UserError, match=path.name):
            seg.read_config(path)


# Whole runs, on generated pictures in the official layouts

def picture(rng, size, classes):
    """A picture of rectangles (uint8 BGR) whose brightness is their class, and its label with some ignored pixels."""
    label = np.zeros(size, np.uint8)
    for _ in range(8):
        y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        label[y:y + size[0] // 3, x:x + size[1] // 3] = rng.integers(0, classes)
    image = np.repeat(label[..., None] * (200 // classes) + 20, 3, 2) + rng.integers(0, 20, (*size, 3))
    label[:2] = 255
    return image.astype(np.uint8), label


def save(image_path, label_path, *content):
    for path, one in zip((image_path, label_path), content):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), one)


def camvid(folder, count=6, size=(72, 96)):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        lines = []
        for n in range(count):
            lines.append(f"images/{part}/{n}.jpg labels/{part}/{n}.png")
            save(folder / f"images/{part}/{n}.jpg", folder / f"labels/{part}/{n}.png", *picture(rng, size, 11))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def voc(folder, size=(72, 96)):
    rng, base = np.random.default_rng(0), folder / "VOC2012"
    for part, labels in (("train", "SegmentationClass"), ("aug", "SegmentationClassAug"), ("val", "SegmentationClass")):
        for n in range(2):
            save(base / f"JPEGImages/{part}{n}.jpg", base / f"{labels}/{part}{n}.png", *picture(rng, size, 21))
        lists = base / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text(f"{part}0\n{part}1\n")
    return folder


def cityscapes(folder, size=(72, 128)):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for n in range(2):
            stem = f"{part}/town/town_{n:06}_000019_"
            save(folder / f"leftImg8bit/{stem}leftImg8bit.png", folder / f"gtFine/{stem}gtFine_labelTrainIds.png",
                 *picture(rng, size, 19))
    return folder


SMALL = ["--batch_size", 2, "--num_workers", 0, "--log_iters", 1, "--seed", 0, "--save_interval", 2]
NARROW = ["model.channels=16", "model.auxiliary_channels=16"]


def crop(config, size):
    number = next(n for n, one in enumerate(config.dic["train_dataset"]["transforms"]) if one["type"] == "BalancedCrop")
    config.dic["train_dataset"]["transforms"][number]["crop_size"] = [size, size]


@pytest.fixture(scope="module")
def small_config(tmp_path_factory):
    """The CamVid config with smaller crops and heads, and its generated pictures."""
    folder = tmp_path_factory.mktemp("camvid")
    config = seg.read_config(ROOT / CAMVID, camvid(folder), opts=NARROW)
    crop(config, 64)
    path = folder / "small.yml"
    path.write_text(str(config))
    return path


def test_train_resume_eval_export(small_config, tmp_path, run_tool):
    net, path = written(tmp_path, 18)
    out = tmp_path / "run"

    def tool(*arguments):
        result = run_tool("finetune_seg.py", "-c", small_config, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    first = tool("train", "--iters", 4, "--pretrained", path, "--save_dir", out, *SMALL, "--use_vdl")
    assert "There are 100/100 variables loaded" in first and "replaces utils.metrics.calculate_area" in first
    assert (out / "best_model/model.pdparams").is_file() and list(out.glob("vdlrecords*"))
    second = tool("train", "--iters", 4, "--resume", out / "iter_2", "--save_dir", tmp_path / "again", *SMALL)
    rates = [re.findall(r"iter: (\d)/4, loss: [\d.]+, lr: ([\d.]+)", log) for log in (first, second)]
    # The log shows a step's rate: 1e-4 + 0.0099 (1 - step / 4)^0.9, the same on the way again.
    assert rates[0] == [(str(n + 1), f"{1e-4 + 0.0099 * (1 - n / 4) ** 0.9:.6f}") for n in range(4)] and rates[1] == rates[0][2:]
    model_path = out / "iter_4/model.pdparams"
    weights = [checkpoint.read_arrays(folder / "model.pdparams") for folder in (out / "iter_2", out / "iter_4")]
    # Both heads learn: without gradients weights would still decay, but a bias would stay 0.
    for name in ("head.classifier.bias", "auxiliary_head.classifier.bias"):
        assert (weights[0][name] != weights[1][name]).all()
    start = {name: value.numpy() for name, value in net.state_dict().items()}
    moved = np.abs(weights[0]["backbone.layer1.0.conv1.weight"] - start["layer1.0.conv1.weight"]).max()
    assert 0 < moved < 0.1  # two steps from the given weights, not from random ones
    score = re.search(r"mIoU (0\.\d+), pixel accuracy", tool("eval", "--model_path", model_path, "--num_workers", 0)).group(1)
    assert f"mIoU: {score} " in first.rsplit("Start evaluating", 1)[1]
    tool("eval", "--model_path", model_path, "--num_workers", 0, "--aug_eval", "--scales", 0.75, 1.0, "--flip_horizontal")
    pictures, masks = small_config.parent, tmp_path / "masks"
    assert "6 masks" in tool("predict", "--model_path", model_path, "--image_path", pictures / "images/test", "--save_dir", masks)
    matrix = sum(dense.confusion(np.array(Image.open(pictures / f"labels/test/{n}.png")), np.array(Image.open(masks / f"{n}.png")),
                                 11) for n in range(6))
    assert f"{dense.mean_iou(matrix)[0]:.4f}" == score
    tool("export", "--model_path", model_path, "--save_dir", tmp_path / "deploy")
    same_masks(small_config, model_path, tmp_path / "deploy")


@pytest.fixture(scope="module")
def small_model(small_config, tmp_path_factory):
    """A whole model of random weights."""
    path = tmp_path_factory.mktemp("model") / "model.pdparams"
    model = SegBuilder(seg.read_config(small_config)).model
    checkpoint.write_arrays(path, {name: value.numpy() for name, value in model.state_dict().items()})
    return path


def pictures_in(folder, *names):
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 32, 3), np.uint8)).save(folder / name)
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_masks_of_a_list_stay_below_the_folder(small_config, small_model, tmp_path):
    before = pictures_in(tmp_path / "pics", "a.png", "deep/b.jpg")
    (tmp_path / "lists").mkdir()
    path, config = tmp_path / "lists/a.txt", seg.read_config(small_config)
    path.write_text(f"{tmp_path}/pics/a.png\n../pics/deep/b.jpg\n")
    assert seg.predict(config, str(small_model), str(path), tmp_path / "masks") == 2
    assert sorted((tmp_path / "masks").rglob("*.*")) == [tmp_path / "masks/a.png", tmp_path / "masks/deep/b.png"]
    assert all(file.read_bytes() == content for file, content in before.items())
    assert Image.open(tmp_path / "masks/a.png").mode == "P"
    path = tmp_path / "pics/b.txt"  # these lie below it
    path.write_text("deep/b.jpg\n")
    assert seg.predict(config, str(small_model), str(path), tmp_path / "b") == 1 and (tmp_path / "b/deep/b.png").is_file()
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "deep"]  # no temporary file


@pytest.mark.parametrize("names, image_path, save_dir, words", [
    (["a.png", "b.jpg"], "pics", "pics", "the mask of .*/pics/a.png would replace the picture .*/pics/a.png; give another folder"),
    (["b.jpg", "b.png"], "pics", "pics", "the mask of .*/pics/b.jpg would replace the picture .*/pics/b.png"),
    (["b.png"], "pics", "link", "the mask of .*/pics/b.png would replace the picture .*/link/b.png"),
    (["a.png"], "pics/a.png", "pics", "would replace the picture"),
    (["a.jpg", "a.PNG"], "pics", "masks", "pics/a.PNG and .*/pics/a.jpg would have the same mask, .*/masks/a.png; give each"),
    (["a.png"], "twice.txt", "masks", "pics/a.png and .*/pics/a.png would have the same mask"),
])
def test_pictures_are_never_replaced_nor_masks_lost(small_config, tmp_path, names, image_path, save_dir, words):
    before = pictures_in(tmp_path / "pics", *names)
    os.symlink(tmp_path / "pics", tmp_path / "link")
    (tmp_path / "twice.txt").write_text("pics/a.png\npics/../pics/a.png\n")
    with pytest.raises(UserError, match=words):  # before the model, which is not there
        seg.predict(seg.read_config(small_config), "/none.pdparams", str(tmp_path / image_path), tmp_path / save_dir)
    assert {file: file.read_bytes() for file in before} == before and not (tmp_path / "masks").exists()


def test_a_picture_or_a_folder_that_ends_it_says_how_many_masks_are_there(small_config, small_model, tmp_path):
    pictures_in(tmp_path / "pics", "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "pics/c.png").write_bytes(b"broken")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/b.png").mkdir()
    for save_dir, words in (("masks", "c.png: .*; 2 of 4 masks were written to .*masks"),
                            ("taken", "taken/b.png: cannot be written .*; 1 of 4 masks were written to .*taken")):
        with pytest.raises(UserError, match=words):
            seg.predict(seg.read_config(small_config), str(small_model), str(tmp_path / "pics"), tmp_path / save_dir)
        assert sorted(path.name for path in (tmp_path / save_dir).iterdir()) == ["a.png", "b.png"]


def same_masks(config, model_path, folder):
    """Paddle Inference and the model itself say the same of every pixel of the test pictures."""
    from paddle.inference import Config, create_predictor

    program = next(path for path in (folder / "model.json", folder / "model.pdmodel") if path.is_file())
    settings = Config(str(program), str(folder / "model.pdiparams"))
    settings.disable_mkldnn()  # whose Paddle 3.3.1 refuses the network, for an attribute that is a list of doubles
    settings.disable_glog_info()
    predictor = create_predictor(settings)
    builder = SegBuilder(seg.read_config(config))
    model = seg.whole_model(builder, model_path)
    for one in (0, 1):
        x = builder.val_dataset[one]["img"][None, :, :, one:]  # of two sizes
        predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(np.ascontiguousarray(x))
        predictor.run()
        mask = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
        assert mask.shape == (1, *x.shape[2:]) and (mask == model(paddle.to_tensor(x))[0].argmax(1).numpy()).all()
    assert "type: Normalize" in (folder / "deploy.yaml").read_text()


def test_own_pictures_by_the_documents_config(tmp_path):
    """The snippet of docs/transfer.md, with another folder."""
    snippet = re.search(r"```yaml\n(_base_: fcn_r50.*?)```", (ROOT / "docs/transfer.md").read_text(), re.DOTALL).group(1)
    root = Path(camvid(tmp_path))
    (root / "val.txt").write_text((root / "test.txt").read_text())
    (tmp_path / "mine.yml").write_text(snippet.replace("_base_: ", f"_base_: {ROOT}/configs/seg/").replace("/my/data", str(root)))
    builder = SegBuilder(seg.read_config(tmp_path / "mine.yml"))
    assert len(builder.train_dataset) and len(builder.val_dataset) and builder.train_dataset.mode == "train"
    assert builder.train_dataset.num_classes == 5 and builder.train_dataset[0]["img"].shape == (3, 512, 512)


def test_another_model_of_paddleseg_by_the_documents_config(tmp_path, run_tool):
    """DeepLabV3+ as in docs/transfer.md, with a smaller backbone, on generated pictures."""
    mine, deeplab = re.findall(r"```yaml\n(_base_: .*?)```", (ROOT / "docs/transfer.md").read_text(), re.DOTALL)
    root = camvid(tmp_path)
    (root / "val.txt").write_text((root / "test.txt").read_text())
    mine = mine.replace("_base_: ", f"_base_: {ROOT}/configs/seg/").replace("/my/data", str(root)).replace("num_classes: 5", "num_classes: 11")
    (tmp_path / "mine.yml").write_text(mine)
    deeplab = deeplab.replace("num_classes: 5", "num_classes: 11").replace("DenseCLResNet50", "DenseCLResNet18")
    (tmp_path / "deeplab.yml").write_text(deeplab)
    config = seg.read_config(tmp_path / "deeplab.yml")
    crop(config, 64)
    (tmp_path / "small.yml").write_text(str(config))
    _, path = written(tmp_path, 18)
    result = run_tool("finetune_seg.py", "-c", tmp_path / "small.yml", "train", "--iters", 2, "--pretrained", path, "--save_dir",
                      tmp_path / "run", "--no_eval", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "There are 100/100 variables loaded" in result.stdout
    weights = checkpoint.read_arrays(tmp_path / "run/iter_2/model.pdparams")
    assert "head.aspp.conv_bn_relu._conv.weight" in weights and np.isfinite(weights["backbone.conv1.weight"]).all()


def test_a_file_in_the_place_of_the_folder_stays(small_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import finetune_seg

    (tmp_path / "run").write_text("weights")
    monkeypatch.setattr(sys, "argv", [str(each) for each in (
        "finetune_seg.py", "-c", small_config, "train", "--batch_size", 2, "--save_dir", tmp_path / "run")])
    with pytest.raises(UserError, match="cannot be made a folder"):
        finetune_seg.main()
    assert (tmp_path / "run").read_text() == "weights"


@pytest.mark.parametrize("arguments, words", [
    (["--batch_size", 7], "6 pictures, fewer than a batch of 7"),
    (["--batch_size", 2, "--resume", "README.md"], "no folder of a checkpoint of PaddleSeg"),
    (["--batch_size", 2, "--pretrained", "/none.pdparams"], "/none.pdparams: no such file"),
    (["--batch_size", 2, "--opts", "model.backbone.output_stride=4"], "output_stride must be 8, 16 or 32"),
    (["--opts", "model.nothing.at=4"], "nothing.at"),
])
def test_train_refuses(small_config, tmp_path, arguments, words, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import finetune_seg

    monkeypatch.setattr(sys, "argv", [str(each) for each in (
        "finetune_seg.py", "-c", small_config, "train", "--save_dir", tmp_path / "run", *arguments)])
    with pytest.raises(UserError, match=words):
        finetune_seg.main()
    assert not (tmp_path / "run").exists()


def test_an_optimizers_file_cannot_run_code(tmp_path):
    class Maker:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    folder = tmp_path / "iter_2"
    folder.mkdir()
    os.rename(written(tmp_path, 18)[1], folder / "model.pdparams")
    (folder / "model.pdopt").write_bytes(pickle.dumps({"a": Maker()}))
    refused(["model.pdopt: asks for", "nothing was run"], lambda: seg._check_resume(components.DenseCLResNet18(), folder, 3))
    assert not (tmp_path / "made").exists()


def test_the_tool_refuses_in_one_sentence(small_config, tmp_path, run_tool):
    result = run_tool("finetune_seg.py", "-c", small_config, "--save_dir", tmp_path / "run", "--dataset_root", "/none")
    assert result.returncode == 1 and "error: /none: no such folder of pictures" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_pictures_without_their_labels_are_refused(tmp_path):
    def built(config, folder):
        return seg._built(SegBuilder(seg.read_config(ROOT / config, folder)), "train_dataset")

    folder = cityscapes(tmp_path / "cityscapes")
    config = "configs/seg/fcn_r50-d8_cityscapes_40k_769.yml"
    assert len(built(config, folder)) == 2
    (folder / "gtFine/train/town/town_000000_000019_gtFine_labelTrainIds.png").unlink()
    refused(["town_000000", "would go with", "town_000001"], built, config, folder)
    folder = voc(tmp_path / "voc")
    config = "configs/seg/fcn_r50-d8_voc12aug_20k.yml"
    assert len(built(config, folder)) == 4  # train and aug
    (folder / "VOC2012/SegmentationClassAug/aug1.png").unlink()
    refused(["aug1.png: no such file"], built, config, folder)
    (folder / "VOC2012/ImageSets/Segmentation/aug.txt").unlink()
    refused(["should be augmented"], built, config, folder)


def test_on_camvid(data_folder, tmp_path, run_tool):
    folder = data_folder / "camvid"
    if not (folder / "train.txt").is_file():
        pytest.skip("PPDENSECL_TEST_DATA has no camvid")
    for part in ("train", "test"):
        lines = (folder / f"{part}.txt").read_text().splitlines()[:4]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines) + "\n")
    for name in ("images", "labels"):
        os.symlink(folder / name, tmp_path / name)
    config = seg.read_config(ROOT / CAMVID, tmp_path, opts=NARROW)
    crop(config, 160)
    (tmp_path / "c.yml").write_text(str(config))
    result = run_tool("finetune_seg.py", "-c", tmp_path / "c.yml", "train", "--iters", 2, "--save_dir", tmp_path / "run", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "#Images: 4 mIoU" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if "camvid" not in path.stem], ids=lambda path: path.stem)
def test_large_configs_train_on_their_layouts(path, tmp_path):
    depth = int(re.search(r"r(\d+)", path.stem).group(1))
    arrays = {name: value.numpy() for name, value in ResNet(depth).state_dict().items()}
    checkpoint.write_arrays(tmp_path / "b.pdparams", arrays)
    make, size = (cityscapes, 65) if "cityscapes" in path.stem else (voc, 64)
    config = seg.read_config(path, make(tmp_path / "data"), tmp_path / "b.pdparams", iters=2, batch_size=2)
    crop(config, size)
    for part in ("train_dataset", "val_dataset"):
        for transform in config.dic[part]["transforms"]:
            if transform["type"] == "ResizeByShort":
                transform["short_size"] = 64
    if "test_config" in config.dic:
        config.dic["test_config"] = {"is_slide": True, "crop_size": [65, 65], "stride": [43, 43]}
    with paddle.utils.unique_name.guard():
        seg.train(config, tmp_path / "run", log_iters=1)
    found = checkpoint.read_arrays(tmp_path / "run/iter_2/model.pdparams")
    assert {name for name in found if name.startswith("backbone.")} == {f"backbone.{name}" for name in arrays}
    assert all(np.isfinite(array).all() for array in found.values())
