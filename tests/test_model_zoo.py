"""Packing for publishing: only the backbone, the same bytes each time, usable by the other tools; damage is refused."""

import json
import pickletools
import shutil

import numpy as np
import paddle
import pytest

from ppdensecl.config import build_config
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import model_zoo
from ppdensecl.models import DenseCL

NAME = "densecl_r18_test"


def trained(folder, stages):
    """Writes a checkpoint as training does; returns its folder and its query backbone {name: array}."""
    paddle.seed(0)
    config = build_config({"output_dir": "/home/somebody/output/run", "data": {"root": "/home/somebody/coco/train2017"},
                           "model": {"backbone": "resnet18", "stages": stages, "hidden_dim": 32, "embedding_dim": 16,
                                     "queue_len": 64}})
    model = DenseCL(**config.model.model_dump(), seed=0)
    for layer in model.encoder_k.sublayers():  # the keys' encoder is another one
        if isinstance(layer, paddle.nn.Conv2D):
            layer.weight.set_value(layer.weight * 2)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    states = {"epoch": 3, "iteration": 30, "iters_per_epoch": 10, "config": config.model_dump(),
              "versions": {"ppdensecl": "0.0", "paddle": "2.6.2"}}
    checkpoint.save(folder, "epoch_3", weights, {"fc.w/velocity_0": np.ones(3, np.float32)}, states)
    checkpoint.write_text(folder / "config.yaml", config.to_yaml())
    prefix = "encoder_q.backbone."
    return folder, {name[len(prefix):]: array for name, array in weights.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), stages=1)


@pytest.fixture
def packed(run, tmp_path):
    model_zoo.pack(str(run[0] / "latest"), tmp_path / "zoo", NAME, "Apache-2.0")
    return next((tmp_path / "zoo").glob("*.pdparams"))


def test_by_the_tool_and_taken_by_the_others(tmp_path, run_tool):
    (tmp_path / "run").mkdir()
    folder, _ = trained(tmp_path / "run", stages=4)
    result = run_tool("model_zoo.py", "pack", folder / "latest", "--out", tmp_path / "zoo", "--name", NAME)
    assert result.returncode == 0, result.stderr
    file, metadata = sorted((tmp_path / "zoo").iterdir(), key=lambda path: path.suffix, reverse=True)
    digest = checkpoint.sha256_of(file)
    assert file.name == f"{NAME}-{digest[:8]}.pdparams" and metadata == file.with_suffix(".json")
    result = run_tool("model_zoo.py", "verify", file)
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stderr
    assert "whole, resnet18, 100 tensors, 11.18 million parameters, all finite" in result.stdout and digest in result.stdout
    result = run_tool("eval.py", "-c", "configs/densecl_r18_demo.yaml", "-o", "data.image_size=32", "--checkpoint", file,
                      "--task", "retrieval", "--count", 8)
    assert result.returncode == 0 and "retrieval: trained" in result.stdout, result.stdout + result.stderr
    result = run_tool("export_finetune.py", file, "--to", "torch", "--out", tmp_path / "b.safetensors")
    assert result.returncode == 0 and "all 100 tensors" in result.stdout, result.stdout + result.stderr
    file.write_bytes(file.read_bytes()[:-1])
    result = run_tool("model_zoo.py", "verify", file)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "damaged or renamed" in result.stderr, result.stderr


def test_it_is_the_backbone_and_nothing_else(run, packed):
    arrays = checkpoint.read_arrays(packed)
    assert arrays.keys() == run[1].keys() and all((arrays[name] == array).all() for name, array in run[1].items())
    words = {value for _, value, _ in pickletools.genops(packed.read_bytes()) if isinstance(value, str)}
    assert {word for word in words if "numpy" in word} == {"numpy"}  # what all of its versions have
    facts = json.loads(packed.with_suffix(".json").read_text())
    assert (facts["architecture"], facts["tensors"], facts["parameters"]) == ("resnet18", 25, 157504)
    assert (facts["epoch"], facts["iteration"], facts["license"]) == (3, 30, "Apache-2.0")
    assert facts["versions"]["paddle"] == "2.6.2" and len(facts["date"]) == 10
    assert facts["config"]["data"]["root"] == "train2017" and facts["config"]["model"]["queue_len"] == 64
    assert "somebody" not in packed.with_suffix(".json").read_text()


def test_the_same_checkpoint_gives_the_same_bytes(run, packed, tmp_path):
    for number, source in enumerate((run[0] / "epoch_3.pdparams", run[0] / "latest")):
        model_zoo.pack(str(source), tmp_path / str(number), NAME, "Apache-2.0")
        for file in (packed, packed.with_suffix(".json")):
            assert (tmp_path / str(number) / file.name).read_bytes() == file.read_bytes()
    checkpoint.extract_backbone(str(run[0] / "latest"), run[0] / "backbone.pdparams")  # in another order it is the same
    arrays = checkpoint.read_arrays(run[0] / "backbone.pdparams")
    checkpoint.write_arrays(run[0] / "backbone.pdparams", dict(sorted(arrays.items())))
    model_zoo.pack(str(run[0] / "backbone.pdparams"), tmp_path / "2", NAME)
    assert (tmp_path / "2" / packed.name).read_bytes() == packed.read_bytes()
    facts = json.loads((tmp_path / "2" / packed.with_suffix(".json").name).read_text())
    assert facts["config"]["model"]["queue_len"] == 64 and facts["license"] == "not stated"  # by the run's config.yaml


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change(path, **facts):
    """Metadata that say something else, with a checksum that is right."""
    found = {**json.loads(path.read_text()), **facts}
    del found["checksum"]
    path.write_text(json.dumps({**found, "checksum": model_zoo._checksum(found)}))


def damage(packed):
    """{what happened: (what it does, words of the sentence)}"""
    metadata = packed.with_suffix(".json")
    other = packed.with_name(packed.name.replace("r18", "r50"))
    hexes = packed.stem.rpartition("-")[2]
    forged = packed.with_name(packed.name.replace(hexes, "0" * 8))
    return {
        "a bit of the weights": (lambda: flipped(packed, 500_000), "damaged or renamed"),
        "a bit of the first bytes": (lambda: flipped(packed, 3), "damaged or renamed"),
        "a bit of the metadata": (lambda: flipped(metadata, metadata.read_text().index("resnet18")), "its checksum is wrong"),
        "metadata cut off": (lambda: metadata.write_text(metadata.read_text()[:-20]), "its checksum is wrong"),
        "metadata of another kind": (lambda: metadata.write_text("[1]"), "its checksum is wrong"),
        "no metadata": (metadata.unlink, "no such file; the metadata belong beside"),
        "metadata of another file": (lambda: change(metadata, sha256="0" * 64), "is not of"),
        "metadata of another network": (lambda: change(metadata, architecture="resnet34"), "holds something else"),
        "cut off": (lambda: packed.write_bytes(packed.read_bytes()[:-1]), "damaged or renamed"),
        "empty": (lambda: packed.write_bytes(b""), "damaged or renamed"),
        "not there": (packed.unlink, "cannot be read"),
        "both renamed": (lambda: (packed.rename(other), metadata.rename(other.with_suffix(".json"))), "is not of"),
        "another number": (lambda: packed.rename(forged), "damaged or renamed"),
        "a plain name": (lambda: packed.rename(packed.with_name("backbone.pdparams")), "expected the name"),
    }


@pytest.mark.parametrize("what", damage(model_zoo.Path(f"{NAME}-12345678.pdparams")))
def test_any_damage_is_refused(packed, what):
    do, words = damage(packed)[what]
    model_zoo.verify(packed)
    do()
    left = next(iter(packed.parent.glob("*.pdparams")), packed)
    with pytest.raises(UserError, match=words) as raised:
        model_zoo.verify(left)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong, words", [
    (np.full(64, np.nan, np.float32), "not all is float32 and finite in bn1.bias"),
    (np.ones(64, np.float64), "not all is float32 and finite in bn1.bias"), (np.ones(3, np.float32), "has shape"),
    (None, "lacks 'bn1.bias'")])
def test_what_is_no_whole_backbone_is_refused(run, packed, wrong, words):
    """Also where name and metadata agree with it: by whoever packed it in another way."""
    arrays = {**run[1], "bn1.bias": wrong} if wrong is not None else {n: a for n, a in run[1].items() if n != "bn1.bias"}
    odd = packed.with_name("odd.pdparams")
    checkpoint.write_arrays(odd, arrays)
    digest = checkpoint.sha256_of(odd)
    forged = odd.rename(packed.with_name(f"{NAME}-{digest[:8]}.pdparams"))
    shutil.copy(packed.with_suffix(".json"), forged.with_suffix(".json"))
    change(forged.with_suffix(".json"), sha256=digest, file=forged.name)
    with pytest.raises(UserError, match=words):
        model_zoo.verify(forged)
    if wrong is None or wrong.dtype == np.float32:  # float64 is converted where it is read
        with pytest.raises(UserError, match=words):
            model_zoo.pack(str(forged), packed.parent, NAME)
    assert not [path for path in packed.parent.iterdir() if path.name.startswith(".")]


def test_pack_refuses(run, packed, tmp_path):
    for source, folder, name, words in [(run[0] / "latest", tmp_path, "a/b", "--name a/b: expected"),
                                        (tmp_path / "none", tmp_path, NAME, "cannot be read"),
                                        (packed, packed.parent, NAME, "is packed already")]:
        with pytest.raises(UserError, match=words):
            model_zoo.pack(str(source), folder, name)
    model_zoo.verify(packed)
