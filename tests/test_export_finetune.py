"""Backbones under other projects' names: complete, equal in what they compute, and refused where they are not."""

import pickletools

import numpy as np
import paddle
import pytest

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import finetune, torch_file
from ppdensecl.models import DenseCL, ResNet
from test_convert import refused

COUNTS = {18: 100, 34: 180, 50: 265, 101: 520}


def backbone(depth):
    """A ResNet none of whose tensors could take another's place unseen."""
    paddle.seed(depth)
    net, rng = ResNet(depth), np.random.default_rng(depth)
    for name, value in net.state_dict().items():
        if "conv" not in name and "downsample.0" not in name:
            value.set_value(rng.uniform(0.5, 1.5, value.shape).astype("float32"))
    net.eval()
    return net


def written(folder, depth, change=lambda arrays: arrays):
    net = backbone(depth)
    path = folder / f"r{depth}.pdparams"
    checkpoint.write_arrays(path, change({name: value.numpy() for name, value in net.state_dict().items()}))
    return net, path


def paddle_vision(depth, arrays):
    """The last map of Paddle's own ResNet, whose names are torchvision's, with all of `arrays` loaded."""
    net = getattr(paddle.vision.models, f"resnet{depth}")(num_classes=0, with_pool=False)
    assert net.state_dict().keys() == arrays.keys()
    net.set_state_dict({name: paddle.to_tensor(array) for name, array in arrays.items()})
    net.eval()
    return net


def same(a, b):
    x = paddle.randn([1, 3, 64, 96])
    a, b = a(x).numpy(), b(x).numpy()
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("depth", COUNTS)
def test_paddleseg_loads_all_and_computes_the_same(tmp_path, depth):
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    net, path = written(tmp_path, depth)
    notes = finetune.export(str(path), tmp_path / "seg.pdparams", "paddleseg")
    assert f"all {COUNTS[depth]} tensors" in notes[-1] and "feature maps are ours" in notes[-1]
    same(net, paddle_vision(depth, checkpoint.read_arrays(tmp_path / "seg.pdparams")))


@pytest.mark.parametrize("depth", COUNTS)
def test_names_in_paddleclas(depth):
    found = finetune.names("paddleclas", depth, ResNet(depth).state_dict())
    assert len(set(found.values())) == COUNTS[depth]
    last = {18: 7, 34: 15, 50: 15, 101: 32}[depth]
    assert found["conv1.weight"] == "stem.0.conv.weight" and found["bn1._variance"] == "stem.0.bn._variance"
    assert found["layer4.0.downsample.1.bias"] == f"blocks.{last - (1 if depth == 18 else 2)}.short.bn.bias"
    assert found[f"layer4.{1 if depth == 18 else 2}.conv2.weight"] == f"blocks.{last}.conv1.conv.weight"


@pytest.mark.parametrize("depth", COUNTS)
def test_paddleclas_loads_all_and_computes_the_same(tmp_path, depth):
    pytest.importorskip("ppcls", reason="no clone of PaddleClas in PYTHONPATH")
    notes = finetune.export(str(written(tmp_path, depth)[1]), tmp_path / "clas.pdparams", "paddleclas")
    assert f"all {COUNTS[depth] + (5 if depth < 50 else 0)} tensors" in notes[-1] and ("(5 of" in notes[-1]) == (depth < 50)


@pytest.mark.parametrize("depth", [18, 50])
def test_paddledet_loads_all_and_computes_the_same(tmp_path, depth):
    pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
    _, path = written(tmp_path, depth)
    notes = finetune.export(str(path), tmp_path / "det.pdparams", "paddledet")
    assert f"all {105 if depth == 18 else 265} tensors" in notes[-1] and "feature maps are ours" in notes[-1]
    assert len(checkpoint.read_arrays(tmp_path / "det.pdparams")) == (105 if depth == 18 else 265)


@pytest.mark.parametrize("depth, name", [(18, "b.pth"), (50, "b.pth"), (50, "b.safetensors")])
def test_torch_file_has_torchvisions_names(tmp_path, depth, name):
    net, path = written(tmp_path, depth)
    notes = finetune.export(str(path), tmp_path / name, "torch")
    assert f"all {COUNTS[depth]} tensors" in notes[-1]
    found = torch_file.read(str(tmp_path / name))
    found = found.get("state_dict", found)
    plan = finetune.names("torch", depth, net.state_dict())
    assert set(plan.values()) == {key for key in found if not key.endswith("num_batches_tracked")}
    assert plan["bn1._variance"] == "bn1.running_var" and plan["layer1.0.conv2.weight"] == "layer1.0.conv2.weight"
    same(net, paddle_vision(depth, {ours: found[theirs] for ours, theirs in plan.items()}))


def test_a_pretraining_checkpoint_by_the_tool(tmp_path, run_tool):
    paddle.seed(0)
    model = DenseCL(backbone="resnet18", hidden_dim=32, embedding_dim=16, queue_len=64)
    checkpoint.write_arrays(tmp_path / "latest.pdparams", {name: value.numpy() for name, value in model.state_dict().items()})
    result = run_tool("export_finetune.py", tmp_path / "latest", "--to", "torch", "--out", tmp_path / "b.safetensors")
    assert result.returncode == 0 and "all 100 tensors" in result.stdout, result.stderr
    found = torch_file.read(str(tmp_path / "b.safetensors"))
    assert (found["layer4.1.bn2.weight"] == model.encoder_q.backbone.layer4[1].bn2.weight.numpy()).all()
    assert (found["conv1.weight"] == model.encoder_q.backbone.conv1.weight.numpy()).all()


@pytest.mark.parametrize("arguments, words", [
    (["/none", "--to", "torch", "--out", "{}/b.pth"], "/none: cannot be read"),
    (["README.md", "--to", "torch", "--out", "{}/b.pth"], "README.md: not a PyTorch, Paddle or safetensors checkpoint"),
    (["README.md", "--to", "torch", "--out", "{}/b.pdparams"], "ends in .pth or .pt or .safetensors"),
    (["README.md", "--to", "paddleseg", "--out", "/none/b.pdparams"], "/none: no such folder"),
])
def test_the_tool_refuses_in_one_sentence(run_tool, tmp_path, arguments, words):
    result = run_tool("export_finetune.py", *(text.format(tmp_path) for text in arguments))
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def without(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def test_bad_checkpoints_are_refused(tmp_path):
    out = tmp_path / "b.pth"
    for change, words in [
        (without("layer3.1.bn2._mean"), ["r18.pdparams lacks 'layer3.1.bn2._mean'"]),
        (lambda arrays: {**arrays, "layer2.0.odd": np.ones(3, np.float32)}, ["unknown 'layer2.0.odd'"]),
        (lambda arrays: {**arrays, "bn1.bias": np.full(64, np.nan, np.float32)}, ["not all numbers are finite in bn1.bias"]),
        (lambda arrays: {**arrays, "bn1.bias": np.ones(3, np.float32)}, ["'bn1.bias' has shape [3], expected [64]"]),
        (lambda arrays: {key: array for key, array in arrays.items() if not key.startswith("layer4")}, ["3 of a ResNet's 4"]),
    ]:
        _, path = written(tmp_path, 18, change)
        refused(words, finetune.export, str(path), out, "torch")
    _, path = written(tmp_path, 18)
    refused(["is the file that is read"], finetune.export, str(path), path, "paddleseg")
    assert [file.name for file in tmp_path.iterdir()] == ["r18.pdparams"]


def test_a_wrong_name_is_seen_before_the_file_is_there(tmp_path, monkeypatch):
    """Of a map from names to names every kind of fault: a name that nobody knows, two exchanged, one lost."""
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    _, path = written(tmp_path, 18)
    right = finetune.names
    a, b = "layer1.0.bn1.weight", "layer1.0.bn2.weight"
    for fault, words in [({a: "layer1.0.norm1.weight"}, ["only 99 of 100", a]), ({a: b, b: a}, ["feature maps differ by"]),
                         ({a: b}, ["only 99 of 100"])]:
        monkeypatch.setattr(finetune, "names", lambda project, depth, ours, fault=fault: {**right(project, depth, ours), **fault})
        refused(words, finetune.export, str(path), tmp_path / "b.pdparams", "paddleseg")
    assert [file.name for file in tmp_path.iterdir()] == ["r18.pdparams"]


def test_an_older_file_stays_where_the_new_one_fails(tmp_path, monkeypatch):
    _, path = written(tmp_path, 18)
    (tmp_path / "b.pth").write_bytes(b"older")

    def failing(our_maps, their_maps):
        raise UserError("differs")

    monkeypatch.setattr(finetune, "_same_maps", failing)
    refused(["differs"], finetune.export, str(path), tmp_path / "b.pth", "torch")
    assert (tmp_path / "b.pth").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 2


def test_the_file_names_nothing_that_only_one_numpy_has(tmp_path):
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    _, path = written(tmp_path, 18)
    finetune.export(str(path), tmp_path / "b.pdparams", "paddleseg")
    words = {value for _, value, _ in pickletools.genops((tmp_path / "b.pdparams").read_bytes()) if isinstance(value, str)}
    assert {word for word in words if "numpy" in word} == {"numpy"}
