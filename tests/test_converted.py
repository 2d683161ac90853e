"""Checkpoints of other projects in use: training goes on with them, and PyTorch and the authors' files give the same numbers.

The checks against the authors' own checkpoints need PPDENSECL_TEST_GOLDEN, a folder with `ckpt/r18s2_*` and `recipe.py`.
"""

import os
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppdensecl.config import build_config
from ppdensecl.engine import checkpoint
from ppdensecl.engine.trainer import Trainer
from ppdensecl.evaluation.features import load_backbone
from ppdensecl.interop import torch_file
from ppdensecl.interop.convert import to_paddle, to_torch
from ppdensecl.models import DenseCL
from test_convert import DENSECL, MOCO, SIZES, refused, same, spelled, states

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
