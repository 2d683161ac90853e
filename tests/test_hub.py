"""paddle.hub from a clone: what it lists, what it says, and that what it loads is the file's backbone or nothing."""

import re
import subprocess
import sys

import numpy as np
import paddle
import pytest

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import convert
from ppdensecl.models import DenseCL, ResNet
from conftest import ROOT

ENTRIES = ["densecl_resnet101", "densecl_resnet18", "densecl_resnet34", "densecl_resnet50"]


def load(name, **options):
    return paddle.hub.load(str(ROOT), name, source="local", **options)


def test_list_and_help():
    assert sorted(paddle.hub.list(str(ROOT), source="local")) == ENTRIES
    for name in ENTRIES:
        words = paddle.hub.help(str(ROOT), name, source="local")
        assert f"ResNet-{name[14:]} of DenseCL" in words and "None gives RANDOM weights" in words


def test_without_a_file_the_weights_are_random():
    paddle.seed(1)
    one = load("densecl_resnet18")
    paddle.seed(1)
    two = ResNet(18)
    assert not one.training and one.state_dict().keys() == two.state_dict().keys()
    assert (one.conv1.weight.numpy() == two.conv1.weight.numpy()).all()
    shown = re.search(r"\[N, (\d+), H/32, W/32\]", paddle.hub.help(str(ROOT), "densecl_resnet18", source="local")).group(1)
    assert load("densecl_resnet18")(paddle.zeros([1, 3, 64, 96])).shape == [1, int(shown), 2, 3]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(the query encoder's backbone, files that hold it): of a whole model, in our names and the authors', and alone."""
    folder = tmp_path_factory.mktemp("hub")
    model = DenseCL("resnet18", hidden_dim=8, embedding_dim=8, queue_len=16)
    for encoder, offset in ((model.encoder_q, 0.25), (model.encoder_k, 0.5)):
        encoder.backbone.bn1._mean.set_value(paddle.full([64], offset))
    checkpoint.write_arrays(folder / "run.pdparams", {name: value.numpy() for name, value in model.state_dict().items()})
    convert.to_torch(str(folder / "run.pdparams"), str(folder / "authors.pth"))
    convert.to_torch(str(folder / "run.pdparams"), str(folder / "torchvision.safetensors"), backbone=True)
    checkpoint.extract_backbone(str(folder / "run"), str(folder / "backbone.pdparams"))
    return model.encoder_q.backbone, folder


@pytest.mark.parametrize("name", ["run", "run.pdparams", "backbone.pdparams", "authors.pth", "torchvision.safetensors"])
def test_every_kind_of_file_gives_the_query_encoders_backbone(checkpoints, name):
    right, folder = checkpoints
    found = load("densecl_resnet18", pretrained=str(folder / name))
    assert not found.training
    for key, value in right.state_dict().items():
        assert (found.state_dict()[key].numpy() == value.numpy()).all(), key


def test_what_does_not_fit_is_refused(checkpoints, tmp_path):
    right, folder = checkpoints
    with pytest.raises(UserError, match="backbone.pdparams: holds a ResNet-18 .* expected a whole ResNet-34"):
        load("densecl_resnet34", pretrained=str(folder / "backbone.pdparams"))
    arrays = {name: value.numpy() for name, value in right.state_dict().items()}
    for change, words in (({"layer4.1.bn2._variance": None}, "lacks 'layer4.1.bn2._variance'"),
                          ({"conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}, r"'conv1.weight' has shape \[64, 3, 3, 3\]")):
        changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        checkpoint.write_arrays(tmp_path / "b.pdparams", changed)
        with pytest.raises(UserError, match=words):
            load("densecl_resnet18", pretrained=str(tmp_path / "b.pdparams"))
    with pytest.raises(UserError, match="none.pth"):
        load("densecl_resnet18", pretrained="none.pth")


def test_from_a_clone_that_is_not_installed(checkpoints, tmp_path):
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
import PIL.Image, paddle
backbone = paddle.hub.load({str(ROOT)!r}, "densecl_resnet18", source="local", pretrained={str(checkpoints[1] / "run")!r})
assert {str(ROOT)!r} not in sys.path
print(float(backbone.bn1._mean[0]), sys.modules["ppdensecl"].__file__)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["0.25", str(ROOT / "ppdensecl/__init__.py")]


def test_it_imports_no_more_than_it_asks_for():
    """paddle.hub refuses where one of `dependencies` is missing, and a user where another one is."""
    code = ("import sys\nfor name in ('lmdb', 'pydantic', 'tqdm', 'visualdl', 'matplotlib'): sys.modules[name] = None\n"
            "import hubconf\nhubconf.densecl_resnet18()\nprint(hubconf.dependencies)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert result.returncode == 0 and "'cv2'" in result.stdout, result.stderr
