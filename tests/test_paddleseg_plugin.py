"""What PaddleSeg lacks, part by part: backbones, head, loss, crop, and the repair of one version."""

import numpy as np
import pytest

pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
import paddle  # noqa: E402
import paddleseg  # noqa: E402

from ppdensecl.engine import checkpoint  # noqa: E402
from ppdensecl.interop import paddleseg_components as seg  # noqa: E402
from test_export_finetune import backbone, refused, written  # noqa: E402


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_backbone_is_ours(tmp_path, depth):
    net, path = written(tmp_path, depth)
    x = paddle.randn([1, 3, 64, 96])
    expected = [value.numpy() for value in net.stages(x)]
    for stride, steps in ((32, (1, 1, 1, 1)), (16, (1, 1, 1, 2)), (8, (1, 1, 2, 4))):
        dilated = getattr(seg, f"DenseCLResNet{depth}")(output_stride=stride, pretrained=str(path), in_channels=3)
        dilated.eval()
        maps = dilated(x)
        assert dilated.feat_channels == [map.shape[1] for map in maps]
        assert [64 // map.shape[2] for map in maps] == [4, 8, min(16, stride), stride]
        for theirs, ours, step in zip(maps, expected, steps):
            assert np.abs(theirs.numpy()[:, :, ::step, ::step] - ours).max() <= 1e-5 * np.abs(ours).max()


def test_what_does_not_fit_is_refused(tmp_path):
    right = {name: value.numpy() for name, value in backbone(18).state_dict().items()}
    for arrays, words in [
        ({name: array for name, array in right.items() if name != "bn1._mean"}, ["only 99 of 100", "bn1._mean"]),
        ({f"backbone.{name}": array for name, array in right.items()}, ["only 0 of 100"]),
        ({**right, "bn1._mean": np.ones(3, np.float32)}, ["only 99 of 100", "bn1._mean"]),
        ({name: array.astype(np.float16) for name, array in right.items()}, ["only 0 of 100", "not float32"]),
    ]:
        checkpoint.write_arrays(tmp_path / "b.pdparams", arrays)
        refused(words, seg.DenseCLResNet18, pretrained=str(tmp_path / "b.pdparams"))
    refused(["no such file", "export_finetune.py"], seg.DenseCLResNet18, pretrained="/none.pdparams")
    refused(["3 channels, not 1"], seg.DenseCLResNet18, in_channels=1)
    checkpoint.write_arrays(tmp_path / "b.pdparams", {**right, "fc.weight": np.ones((512, 10), np.float32)})
    seg.DenseCLResNet18(pretrained=str(tmp_path / "b.pdparams"))  # a classifier is no part of a backbone


def test_a_loader_that_sets_nothing_is_seen(tmp_path, monkeypatch):
    _, path = written(tmp_path, 18)
    monkeypatch.setattr(seg.utils, "load_pretrained_model", lambda model, path: None)
    refused(["only"], seg.DenseCLResNet18, pretrained=str(path))


def test_fcn_gives_logits_of_the_pictures_size():
    model = seg.FCNWithAuxiliary(5, seg.DenseCLResNet18(), channels=16, auxiliary_channels=8)
    x = paddle.randn([2, 3, 97, 64])
    assert [y.shape for y in model(x)] == [[2, 5, 97, 64]] * 2
    model.eval()
    assert [y.shape for y in model(x)] == [[2, 5, 97, 64]]
    heads = {name: value.shape for name, value in model.state_dict().items()
             if not name.startswith("backbone.") and value.ndim == 4}
    assert heads == {"head.convs.0.0.weight": [16, 512, 3, 3], "head.convs.1.0.weight": [16, 16, 3, 3],
                     "head.conv_cat.0.weight": [16, 528, 3, 3], "head.classifier.weight": [5, 16, 1, 1],
                     "auxiliary_head.convs.0.0.weight": [8, 256, 3, 3], "auxiliary_head.classifier.weight": [5, 8, 1, 1]}


def test_loss_is_mmsegmentations_mean():
    rng = np.random.default_rng(0)
    logit, label = rng.standard_normal((2, 4, 5, 6)).astype("float32"), rng.integers(0, 4, (2, 5, 6))
    label[0, :3] = 255
    exponents = np.exp(logit)
    chosen = np.take_along_axis(logit, np.where(label == 255, 0, label)[:, None], 1)[:, 0]
    losses = np.where(label == 255, 0, np.log(exponents.sum(1)) - chosen)
    for option, expected in ((False, losses.mean()), (True, losses.sum() / (label != 255).sum())):
        loss = seg.PixelCrossEntropy(avg_non_ignore=option)(paddle.to_tensor(logit), paddle.to_tensor(label))
        assert loss.shape == [1] and abs(float(loss) - expected) < 1e-6
    nothing = seg.PixelCrossEntropy(avg_non_ignore=True)(paddle.to_tensor(logit), paddle.full([2, 5, 6], 255, "int64"))
    assert float(nothing) == 0


def test_crop_keeps_picture_and_label_together():
    np.random.seed(0)
    rows, columns = np.mgrid[:60, :90]
    label = np.where(columns < 60, 1, rows % 4).astype(np.uint8)  # in most places there is one class alone
    uniform = 0
    for _ in range(50):
        data = {"img": np.stack([label, rows, columns], 2).astype("float32"), "label": label, "gt_fields": ["label"]}
        data = seg.BalancedCrop((32, 40))(data)
        assert data["img"].shape == (40, 32, 3) and (data["img"][..., 0] == data["label"]).all()
        uniform += np.bincount(data["label"].ravel()).max() >= 0.75 * data["label"].size
    assert uniform < 5  # without drawing again it is most of them
    data = seg.BalancedCrop((100, 100))({"img": np.zeros((60, 90, 3), "float32"), "label": label, "gt_fields": ["label"]})
    assert data["img"].shape == (100, 100, 3) and (data["label"][60:] == 255).all() and (data["img"][60:] == 114.5).all()


def test_areas_are_those_of_the_pixels():
    rng = np.random.default_rng(0)
    pred, label = rng.integers(0, 3, (1, 1, 8, 9)), rng.integers(0, 3, (1, 1, 8, 9))
    label[..., :2] = 255
    counted = label != 255
    expected = [[((pred == c) & (label == c)).sum() for c in range(4)], [((pred == c) & counted).sum() for c in range(4)],
                [(label == c).sum() for c in range(4)]]
    found = paddleseg.utils.metrics.calculate_area(paddle.to_tensor(pred, dtype="int32"), paddle.to_tensor(label), 4)
    assert [area.tolist() for area in found] == expected
    with pytest.raises(ValueError, match="expected the same"):
        seg._calculate_area(paddle.zeros([1, 4, 6], "int32"), paddle.zeros([1, 6, 4], "int64"), 2)


def test_only_the_version_that_needs_it_is_repaired(monkeypatch, capsys):
    def original():
        pass

    monkeypatch.setattr(seg.metrics, "calculate_area", original)
    monkeypatch.setattr(paddleseg, "__version__", "2.9.0")
    seg.repair()
    assert seg.metrics.calculate_area is original and "repairs nothing" in capsys.readouterr().out
    monkeypatch.setattr(paddleseg, "__version__", "2.8.0")
    seg.repair()
    assert seg.metrics.calculate_area is seg._calculate_area and "replaces utils.metrics" in capsys.readouterr().out
