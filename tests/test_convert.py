"""Checkpoints of other projects: taken over exactly and given back bit for bit. (`test_convert_tool.py`: refused.)

Other projects' names are spelled out here once more, so that a fault in the tables of `interop.layouts` cannot hide. The
checks against the authors' own checkpoints need PPDENSECL_TEST_GOLDEN, a folder with `ckpt/r18s2_*` and `recipe.py`.
"""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppdensecl.config import build_config
from ppdensecl.engine import checkpoint
from ppdensecl.engine.trainer import Trainer
from ppdensecl.errors import UserError
from ppdensecl.evaluation.features import load_backbone
from ppdensecl.interop import layouts, torch_file
from ppdensecl.interop.convert import to_paddle, to_torch
from ppdensecl.models import DenseCL

SIZES = {"backbone": "resnet18", "stages": 1, "hidden_dim": 16, "embedding_dim": 8, "queue_len": 12}
Q = "encoder_q.backbone."
HEAD = {"global_fc1": "mlp.0", "global_fc2": "mlp.2", "dense_conv1": "mlp2.0", "dense_conv2": "mlp2.2"}
QUEUE = {"queue.keys": "queue", "queue.pointer": "queue_ptr", "queue_dense.keys": "queue2", "queue_dense.pointer": "queue2_ptr"}
PARTS = {"densecl": ("{}.0.", "{}.1."), "passl": ("{}.0.", "{}.1."), "moco": ("module.{}.", "module.{}.")}
MMPRETRAIN = {"encoder_q": ("backbone.", "neck."), "encoder_k": ("encoder_k.module.0.", "encoder_k.module.1.")}


def arrays_of(dense=True):
    """A model's arrays, all of them random, as after some training."""
    model, rng = DenseCL(**SIZES, loss_lambda=0.5 if dense else 0.0), np.random.default_rng(int(dense))
    arrays = {name: rng.standard_normal(value.shape).astype("float32") for name, value in model.state_dict().items()}
    arrays.update({name: np.abs(array) for name, array in arrays.items() if name.endswith("_variance")})
    return {**arrays, **{name: np.array([4], np.int64) for name in arrays if name.endswith("pointer")}}


DENSECL, MOCO = arrays_of(), arrays_of(dense=False)


def spelled(arrays, layout, count=7):
    """{our name: array} as another project has it; BatchNorm's counters are `count`, or count(their name)."""
    result, leaves = {}, layout == "passl"
    for name, array in arrays.items():
        if name in QUEUE:
            result[("module." if layout == "moco" else "") + QUEUE[name]] = array.T.copy() if array.ndim == 2 else array
            continue
        encoder, part, rest = name.split(".", 2)
        backbone, head = MMPRETRAIN[encoder] if layout == "mmpretrain" else [p.format(encoder) for p in PARTS[layout]]
        if part == "head":
            layer, leaf = rest.split(".")
            theirs = f"{head}{HEAD[layer].replace('mlp', 'fc') if layout == 'moco' else HEAD[layer]}.{leaf}"
            result[theirs] = array.T.copy() if "fc" in layer and not leaves else array
            continue
        result[backbone + (rest if leaves else rest.replace("_mean", "running_mean").replace("_variance", "running_var"))] = array
        if rest.endswith("_variance") and not leaves:
            counter = backbone + rest.replace("_variance", "num_batches_tracked")
            result[counter] = np.array(count(counter) if callable(count) else count, np.int64)
    if layout == "mmpretrain":
        result["encoder_k.steps"] = np.array(7, np.int64)
    if layout in ("densecl", "passl"):
        result.update({"backbone." + name[12:]: array for name, array in list(result.items()) if name.startswith("encoder_q.0.")})
    return result


def same(a, b):
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


def refused(words, function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*map(str, arguments), **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and all(word in text for word in words), text


def states(path):
    return json.loads(Path(f"{path}.pdstates").read_text())


# Names and directions

CASES = {"densecl": ("densecl", DENSECL), "openselfsup_moco": ("densecl", MOCO), "mmpretrain": ("mmpretrain", DENSECL),
         "mmpretrain_moco": ("mmpretrain", MOCO), "moco": ("moco", MOCO)}
each = pytest.mark.parametrize("layout, arrays", CASES.values(), ids=CASES)


@each
def test_parts_of_a_model_are_named_alone(layout, arrays):
    gradients = {name: array for name, array in arrays.items() if name.startswith("encoder_q") and "._" not in name}
    theirs = {name: array for name, array in spelled(gradients, layout).items()
              if not name.startswith("backbone.") or layout == "mmpretrain"}
    theirs.pop("encoder_k.steps", None)
    same(layouts.to_torch(gradients, layout), theirs)
    same(layouts.from_torch(theirs, layout), gradients)


@each
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(layout, arrays, suffix, tmp_path):
    theirs = spelled(arrays, layout)
    torch_file.write(tmp_path / "in.pth", {"meta": {"epoch": 3, "iter": 21}, "state_dict": theirs})
    notes = to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours.pdparams")
    same(checkpoint.load_weights(tmp_path / "ours"), arrays)
    dense = arrays is DENSECL
    assert ("DenseCL" if dense else "MoCo-v2") in notes[0]
    assert "resnet18, 1 of 4 stages, K = 12, epoch 3, iteration 21" in notes[0]
    found = checkpoint.verify(tmp_path / "ours")
    assert (found["epoch"], found["iteration"], found["iters_per_epoch"]) == (3, 21, 7)
    assert {key: found["config"]["model"][key] for key in SIZES} == SIZES
    assert found["config"]["model"]["loss_lambda"] == (0.5 if dense else 0.0)
    assert not list(tmp_path.glob("latest*"))
    out = f"{tmp_path}/back{suffix}"
    to_torch(f"{tmp_path}/ours", out)
    back = torch_file.read(out)
    same(back if suffix == ".safetensors" else back["state_dict"], theirs)
    to_torch(out, f"{tmp_path}/again.pth")  # a torch file may be read, too
    again = torch_file.read(f"{tmp_path}/again.pth")
    same(again["state_dict"], theirs)
    assert (again["meta"]["epoch"], again["meta"]["iter"]) == (3, 21)


def test_what_a_file_lacks_is_not_invented_on_the_way_back(tmp_path):
    variants = {"no counters": {n: a for n, a in spelled(DENSECL, "densecl").items() if not n.endswith("tracked")},
                "no copies": {n: a for n, a in spelled(DENSECL, "densecl").items() if not n.startswith("backbone.")},
                "few counters": {n: a for n, a in spelled(DENSECL, "densecl").items() if "layer1.0.bn1.num_" not in n},
                "other counters": spelled(DENSECL, "densecl", lambda name: len(name)),
                "wrapped": {f"module.{n}": a for n, a in spelled(DENSECL, "densecl").items()},
                "not wrapped": {n[len("module."):]: a for n, a in spelled(MOCO, "moco").items()}}
    for number, theirs in enumerate(variants.values()):
        torch_file.write(tmp_path / "in.pth", theirs)
        to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/{number}")
        to_torch(f"{tmp_path}/{number}", f"{tmp_path}/back.pth")
        same(torch_file.read(tmp_path / "back.pth")["state_dict"], theirs)


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_passl(protocol, tmp_path):
    theirs = spelled(DENSECL, "passl")
    if protocol is None:  # PASSL's own way: a pickle of plain numpy arrays
        content = {"epoch": 5, "state_dict": theirs, "optimizer": {"conv2d_0.w_0_velocity_0": np.ones(3), "last_lr": 0.1}}
        (tmp_path / "in.pdparams").write_bytes(pickle.dumps(content))
    else:  # of layers, paddle.save pickles pairs of a parameter's name and its array
        layer = paddle.nn.Layer()
        for name, array in theirs.items():
            inner = layer
            for part in name.split(".")[:-1]:
                inner = inner._sub_layers.setdefault(part, paddle.nn.Layer())
            parameter = inner.create_parameter(array.shape, dtype=str(array.dtype)) if array.dtype == "float32" else None
            if parameter is None:
                inner.register_buffer(name, paddle.to_tensor(array))
            else:
                parameter.set_value(array)
                inner._parameters[name.rpartition(".")[2]] = parameter
        paddle.save({"epoch": 5, "state_dict": layer.state_dict()}, f"{tmp_path}/in.pdparams", protocol=protocol)
        assert b"tuple" in (tmp_path / "in.pdparams").read_bytes()
    notes = to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/ours")
    assert "PASSL" in notes[0] and any("momentum starts at zero" in note for note in notes)
    same(checkpoint.load_weights(tmp_path / "ours"), DENSECL)
    assert (states(tmp_path / "ours")["iteration"], states(tmp_path / "ours")["iters_per_epoch"]) == (5, 1)
    to_torch(f"{tmp_path}/ours", f"{tmp_path}/back.pth")
    same(torch_file.read(tmp_path / "back.pth")["state_dict"], spelled(DENSECL, "densecl", 0))


BACKBONE = {name[len(Q):]: array for name, array in DENSECL.items() if name.startswith(Q)}
PLAIN = {name[12:]: array for name, array in spelled(DENSECL, "densecl").items() if name.startswith("encoder_q.0.")}
FC = {"fc.weight": np.ones((5, 64), np.float32), "fc.bias": np.ones(5, np.float32)}


@pytest.mark.parametrize("content", [
    PLAIN, {**PLAIN, **FC}, {"state_dict": PLAIN, "author": "DenseCL"}, {f"module.{n}": a for n, a in {**PLAIN, **FC}.items()},
    {"state_dict": {f"backbone.{n}": a for n, a in PLAIN.items()}}])
def test_backbones(content, tmp_path):
    torch_file.write(tmp_path / "in.pth", content)
    notes = to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours")
    assert ("a classifier (2 entries)" in " ".join(notes)) == any("fc.bias" in name for name in content)
    same(checkpoint.read_arrays(tmp_path / "ours.pdparams"), BACKBONE)
    load_backbone(tmp_path / "ours.pdparams")
    for out in ("back.pth", "back.safetensors"):
        to_torch(f"{tmp_path}/ours.pdparams", f"{tmp_path}/{out}")
        back = torch_file.read(tmp_path / out)
        same(back.get("state_dict", back), PLAIN)
    (tmp_path / "ours.json").write_text('{"layout": []}')  # somebody else's
    to_torch(f"{tmp_path}/ours.pdparams", f"{tmp_path}/back.pth")
    assert torch_file.read(tmp_path / "back.pth")["state_dict"]["bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize("layout", ["densecl", "mmpretrain", "moco", "moco1", "passl", "ours"])
def test_backbone_of_a_whole_checkpoint(layout, tmp_path):
    arrays = MOCO if "moco" in layout else DENSECL
    theirs = spelled(arrays, {"moco1": "moco", "ours": "densecl"}.get(layout, layout))
    source, expected = f"{tmp_path}/in.pth", {name: arrays[Q + name] for name in BACKBONE}
    if layout == "moco1":
        theirs = {n: a for n, a in theirs.items() if ".fc." not in n}
        theirs.update({f"module.{encoder}.{name}": array for encoder in ("encoder_q", "encoder_k") for name, array in FC.items()})
    if layout == "passl":
        source = f"{tmp_path}/in.pdparams"
        paddle.save({"state_dict": theirs}, source)
    else:
        torch_file.write(source, theirs)
    if layout == "moco1":
        refused(["MoCo v1", "--backbone"], to_paddle, source, tmp_path / "whole")
        assert not list(tmp_path.glob("whole*"))
    if layout == "ours":
        to_paddle(source, f"{tmp_path}/whole")
        source = f"{tmp_path}/whole"
        checkpoint.extract_backbone(source, tmp_path / "extracted.pdparams")
        same(checkpoint.read_arrays(tmp_path / "extracted.pdparams"), BACKBONE)
    notes = to_paddle(source, f"{tmp_path}/b.pdparams", backbone=True)
    assert "backbone of a checkpoint" in notes[0] and "what is not the query encoder's backbone" in " ".join(notes)
    same(checkpoint.read_arrays(tmp_path / "b.pdparams"), expected)
    count = 0 if layout == "passl" else 7
    to_torch(source, f"{tmp_path}/b.pth", backbone=True)
    to_torch(f"{tmp_path}/b.pdparams", f"{tmp_path}/c.pth")
    for name in ("b.pth", "c.pth"):
        back = torch_file.read(tmp_path / name)["state_dict"]
        assert back["layer1.1.bn2.num_batches_tracked"] == count
        same(layouts.from_torch(back, "backbone"), expected)


def test_paddles_own_resnet(tmp_path):
    model = paddle.vision.models.resnet18()
    paddle.save(model.state_dict(), f"{tmp_path}/in.pdparams")
    assert "classifier" in " ".join(to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/out"))
    found = load_backbone(tmp_path / "out.pdparams").state_dict()
    for name, value in found.items():
        assert (value.numpy() == model.state_dict()[name].numpy()).all(), name


def test_other_number_types_become_float32(tmp_path):
    half = {name: array.astype("float16") if array.ndim == 4 else array.astype("float64") if array.ndim == 1 else array
            for name, array in PLAIN.items()}
    torch_file.write(tmp_path / "in.pth", half)
    notes = " ".join(to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours"))
    assert "5 entries of float16 became float32" in notes and "20 entries of float64 became float32" in notes
    found = checkpoint.read_arrays(tmp_path / "ours.pdparams")
    assert all(array.dtype == "float32" for array in found.values())
    assert (found["conv1.weight"] == PLAIN["conv1.weight"].astype("float16")).all()
    stored = {name: (array.view("uint32") >> 16).astype("uint16") for name, array in BACKBONE.items()}
    paddle.save(stored, f"{tmp_path}/in.pdparams")
    assert "of bfloat16 became float32" in " ".join(to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/ours"))
    found = checkpoint.read_arrays(tmp_path / "ours.pdparams")["conv1.weight"]
    assert (found.view("uint32") == BACKBONE["conv1.weight"].view("uint32") & 0xFFFF0000).all()


# Going on with training

def parameters(arrays, encoder):
    return [name for name in arrays if name.startswith(encoder) and not name.endswith(("_mean", "_variance"))]


def run_of(tmp_path, name, **model):
    return build_config({"output_dir": f"{tmp_path}/{name}", "device": "cpu", "model": {**SIZES, **model},
                         "data": {"source": "synthetic", "synthetic_count": 8, "image_size": 32, "batch_size": 4, "workers": 0},
                         "optim": {"epochs": 50, "max_iters": 15}, "log": {"visualdl": False}})


@pytest.mark.parametrize("layout, arrays", [("densecl", DENSECL), ("mmpretrain", DENSECL), ("moco", MOCO)])
def test_training_goes_on_with_queues_key_encoder_and_momentum(layout, arrays, tmp_path):
    rng, dense = np.random.default_rng(5), arrays is DENSECL
    ours = {name: rng.standard_normal(arrays[name].shape).astype("float32") for name in parameters(arrays, "encoder_q")}
    turned = [array.T if "global_fc" in name and array.ndim == 2 else array for name, array in ours.items()]
    numbers = list(range(len(ours) + len(parameters(arrays, "encoder_k"))))
    optimizer = {"state": {n: {"momentum_buffer": buffer} for n, buffer in enumerate(turned)},
                 "param_groups": [{"lr": 0.1, "params": numbers[:5]}, {"lr": 0.1, "params": numbers[5:]}]}
    content = {"state_dict": spelled(arrays, layout, 14), **({"epoch": 7} if layout == "moco" else {})}
    for name, extra in (("with", {"optimizer": optimizer}), ("without", {})):
        torch_file.write(tmp_path / f"{name}.pth", {**content, **extra})
        notes = " ".join(to_paddle(f"{tmp_path}/{name}.pth", f"{tmp_path}/{name}"))
        assert (f"momentum taken over for {len(ours)} of {len(ours)}" if extra else "momentum starts at zero") in notes
    same({n.partition("/")[0]: a for n, a in checkpoint.load_optimizer(tmp_path / "with").items()}, ours)
    velocity = {}
    for name in ("with", "without"):
        trainer = Trainer(run_of(tmp_path, f"run_{name}", loss_lambda=0.5 if dense else 0.0), f"{tmp_path}/{name}")
        assert trainer.iteration == 14
        same({n: v.numpy() for n, v in trainer.model.state_dict().items()}, arrays)
        trainer.fit()
        assert int(trainer.model.queue.pointer) == 8 and trainer.iteration == 15
        assert (trainer.model.queue.keys.numpy()[:4] == arrays["queue.keys"][:4]).all()
        velocity[name] = checkpoint.load_optimizer(f"{tmp_path}/run_{name}/latest")
    for name, before in ours.items():  # the gradient of both is the same
        difference = velocity["with"][f"{name}/velocity_0"] - velocity["without"][f"{name}/velocity_0"]
        assert np.allclose(difference, 0.9 * before, rtol=1e-4, atol=1e-4), name
    assert states(f"{tmp_path}/run_with/latest")["iteration"] == 15
    to_torch(f"{tmp_path}/run_with/latest", f"{tmp_path}/back.pth")
    back = torch_file.read(tmp_path / "back.pth")["state_dict"]
    assert back["encoder_q.0.bn1.num_batches_tracked"] == 15 and back["backbone.bn1.num_batches_tracked"] == 15


@pytest.mark.parametrize("change", [lambda o: o["param_groups"][0]["params"].pop(), lambda o: o.update(state=3),
                                    lambda o: o["state"][0].update(momentum_buffer=np.ones((2, 2), np.float32)),
                                    lambda o: o["state"].update({0: 5}), lambda o: o.pop("param_groups")])
def test_an_optimizer_of_another_model_is_left_out(change, tmp_path):
    names = parameters(DENSECL, "encoder_q") + parameters(DENSECL, "encoder_k")
    optimizer = {"state": {0: {"momentum_buffer": DENSECL[names[0]]}}, "param_groups": [{"params": list(range(len(names)))}]}
    torch_file.write(tmp_path / "in.pth", {"state_dict": spelled(DENSECL, "densecl"), "optimizer": optimizer})
    assert "taken over for 1 of" in " ".join(to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours"))
    change(optimizer)
    torch_file.write(tmp_path / "in.pth", {"state_dict": spelled(DENSECL, "densecl"), "optimizer": optimizer})
    assert "momentum starts at zero" in " ".join(to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours"))
    assert checkpoint.load_optimizer(tmp_path / "ours") == {}


def test_a_given_config_must_agree(tmp_path):
    torch_file.write(tmp_path / "in.pth", spelled(DENSECL, "densecl"))
    source, out = f"{tmp_path}/in.pth", f"{tmp_path}/ours"
    for key, value in (("queue_len", 13), ("hidden_dim", None), ("stages", 2), ("backbone", "resnet34"), ("loss_lambda", 0.0)):
        refused([f"'model.{key}'", "in.pth"], to_paddle, source, out, config=run_of(tmp_path, "run", **{key: value}))
    to_paddle(source, out, config=run_of(tmp_path, "run", temperature=0.3))
    assert states(out)["config"]["model"]["temperature"] == 0.3
    assert states(out)["iteration"] == 7 and states(out)["iters_per_epoch"] is None  # the counters' own


# Against PyTorch, and against the authors' own files

def torch_model(torch, sizes):
    """The authors' modules for one stage of ResNet-18, written from their names."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
            self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)

        def forward(self, x):
            return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            self.layer1 = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.layer1(torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1))

    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            hidden, dim = sizes["hidden_dim"], sizes["embedding_dim"]
            self.mlp = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, dim))
            self.mlp2 = nn.Sequential(nn.Conv2d(64, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))

        def forward(self, x):
            return self.mlp(x.mean((2, 3))), self.mlp2(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_q, self.encoder_k = nn.Sequential(Backbone(), Neck()), nn.Sequential(Backbone(), Neck())
            self.backbone = self.encoder_q[0]
            for name in ("queue", "queue2"):
                self.register_buffer(name, torch.zeros(sizes["embedding_dim"], sizes["queue_len"]))
                self.register_buffer(f"{name}_ptr", torch.zeros(1, dtype=torch.long))

    return Model()


def test_pytorch_loads_what_we_write_and_computes_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    model = DenseCL(**SIZES)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    checkpoint.save(tmp_path, "ours", arrays, {}, {"iteration": 9, "epoch": 1}, latest=False)
    to_torch(f"{tmp_path}/ours", f"{tmp_path}/out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    theirs = torch_model(torch, SIZES)
    theirs.load_state_dict(content["state_dict"], strict=True)
    assert content["meta"]["iter"] == 9 and int(theirs.encoder_k[0].bn1.num_batches_tracked) == 9
    assert torch.equal(theirs.queue2.T, torch.from_numpy(arrays["queue_dense.keys"]))
    theirs.eval(), model.eval()
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype("float32")
    with torch.no_grad(), paddle.no_grad():
        for encoder in ("encoder_q", "encoder_k"):
            ours = getattr(model, encoder)
            found = [y.numpy() for y in ours.head(ours.backbone(paddle.to_tensor(x)))[:2]]
            for a, b in zip(found, getattr(theirs, encoder)(torch.from_numpy(x))):
                assert np.abs(a - b.numpy()).max() < 1e-5 * np.abs(a).max()
    torch.save(theirs.state_dict(), tmp_path / "again.pth")
    to_paddle(f"{tmp_path}/again.pth", f"{tmp_path}/again")
    same(checkpoint.load_weights(tmp_path / "again"), arrays)


@pytest.fixture
def golden():
    folder = os.environ.get("PPDENSECL_TEST_GOLDEN")
    if not folder or not (Path(folder) / "ckpt").is_dir():
        pytest.skip("PPDENSECL_TEST_GOLDEN does not name a folder with ckpt/")
    return Path(folder)


def test_the_authors_checkpoint(golden, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(golden)
    import recipe
    source, ckpt = golden / "ckpt/r18s2_epoch_20.pth", golden / "ckpt"
    notes = to_paddle(str(source), f"{tmp_path}/ours")
    assert "resnet18, 2 of 4 stages, K = 64, epoch 20, iteration 20" in notes[0]
    assert "momentum taken over for 38 of 38" in notes[3]
    to_torch(f"{tmp_path}/ours", f"{tmp_path}/back.pth")
    same(torch_file.read(tmp_path / "back.pth")["state_dict"], torch_file.read(source)["state_dict"])
    model = DenseCL(**states(tmp_path / "ours")["config"]["model"])
    checkpoint.set_weights(model, checkpoint.load_weights(tmp_path / "ours"), "ours")
    model.eval()
    expected, x = np.load(ckpt / "r18s2_eval_outputs.npz"), paddle.to_tensor(recipe.images(100, 2, 64)[:, 0])
    found = {}
    with paddle.no_grad():
        for letter, encoder in (("q", model.encoder_q), ("k", model.encoder_k)):
            features = encoder.backbone(x)
            pooled, grid, dense = encoder.head(features)
            found.update({letter: pooled, f"{letter}_grid": grid.flatten(2), f"{letter}2": dense})
            found.setdefault("feat", features)
    for name in ("r18s2_extracted.pth", "r18s2_extracted_legacy.pth"):
        to_paddle(str(ckpt / name), f"{tmp_path}/backbone")
        with paddle.no_grad():
            found[name] = load_backbone(tmp_path / "backbone.pdparams")(x)
        to_torch(f"{tmp_path}/backbone.pdparams", f"{tmp_path}/backbone.pth")
        same(torch_file.read(tmp_path / "backbone.pth")["state_dict"], torch_file.read(ckpt / name)["state_dict"])
    assert len(found) == 9
    for name, value in found.items():
        wanted = expected["feat" if name.endswith(".pth") else name]
        difference = np.abs(value.numpy().reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        print(f"{name}: within {difference:.1e} of the largest")
        assert difference < 1e-5, name


def test_training_goes_on_from_the_authors_checkpoint(golden, run_tool, tmp_path):
    to_paddle(str(golden / "ckpt/r18s2_epoch_20.pth"), f"{tmp_path}/ours")
    result = run_tool("train.py", "-c", "configs/densecl_r50.yaml", "--resume", tmp_path / "ours", "-o", "device=cpu",
                      f"output_dir={tmp_path}/run", "model.stages=2", "model.backbone=resnet18", "model.hidden_dim=null",
                      "model.queue_len=64", "data.source=synthetic", "data.synthetic_count=4", "data.batch_size=4",
                      "data.image_size=64", "data.workers=0", "optim.max_iters=22", "log.visualdl=false", "log.interval=1")
    assert result.returncode == 0 and "at iteration 20" in result.stdout and "epoch: 22/200" in result.stdout, result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    assert states(tmp_path / "run/latest")["iteration"] == 22
