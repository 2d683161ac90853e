"""Mixed precision. No CPU can run its half precision: Paddle's autocast, and its loss scaler, do nothing there. What is run
here is the rest: a loss scaler that takes the CPU for a GPU, and which parts of a step autocast is kept from."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.amp import grad_scaler
from paddle.amp.auto_cast import amp_state

from ppdensecl.config import load_config
from ppdensecl.engine import building, checkpoint, device
from ppdensecl.engine.building import build_model
from ppdensecl.engine.trainer import Trainer
from ppdensecl import parallel
from ppdensecl.errors import UserError
from ppdensecl.models import DenseCL, densecl
from ppdensecl.models.densecl import normalised_rows

ROOT = Path(__file__).resolve().parent.parent
TINY = ["data.synthetic_count=20", "data.image_size=32", "data.batch_size=4", "data.workers=0", "model.queue_len=30",
        "model.hidden_dim=16", "model.embedding_dim=8", "model.stages=1", "log.interval=1", "log.visualdl=false",
        "optim.epochs=2", "optim.accumulate=2", "save.keep_last=null"]
pytestmark = pytest.mark.filterwarnings("ignore:amp_guard can only be enabled")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    place = SimpleNamespace(is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False)
    monkeypatch.setattr(grad_scaler, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=place))

    def select(name):
        paddle.set_device("cpu")
        return "gpu:0"

    monkeypatch.setattr(device, "select", select)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (8, 0))


def _config(folder, *overrides):
    return load_config(ROOT / "configs/densecl_r18_demo.yaml", [*TINY, f"output_dir={folder}", *overrides])


def _fit(folder, *overrides, resume=None, scale=None):
    trainer = Trainer(_config(folder, *overrides), resume)
    if scale:
        trainer.scaler.set_init_loss_scaling(scale)
    trainer.fit()
    return trainer, checkpoint.load_weights(folder / "latest")


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and (a[name] == b[name]).all(), name


@pytest.mark.parametrize("clip_norm", ["null", "0.5"])
def test_a_scaled_run_is_the_plain_one(as_if_on_a_gpu, tmp_path, clip_norm):
    """The scale is a power of two: unless gradients are unscaled exactly once, after the last of the accumulated passes and
    before they are clipped, some bit differs."""
    clip = f"optim.clip_norm={clip_norm}"
    _, plain = _fit(tmp_path / "plain", clip)
    trainer, scaled = _fit(tmp_path / "scaled", clip, "optim.amp=float16")
    assert trainer.scaler.is_enable() and float(trainer.scaler.state_dict()["scale"][0]) == 2**14
    _same(scaled, plain)


def test_a_gpu_that_would_compute_in_float32_is_refused(monkeypatch, tmp_path):
    for capability, refused in (((6, 1), {"float16", "bfloat16"}), ((7, 5), {"bfloat16"}), ((8, 0), set())):
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
        for amp in ("off", "float16", "bfloat16"):
            with pytest.raises(UserError, match="too old") if amp in refused else contextlib.nullcontext():
                building.check(_config(tmp_path, f"optim.amp={amp}"), "gpu:0")


def test_a_step_that_overflows_is_skipped_and_everything_else_goes_on(as_if_on_a_gpu, tmp_path):
    trainer, found = _fit(tmp_path, "optim.amp=float16", "optim.max_iters=1", scale=2.0**127)
    fresh = build_model(trainer.config)
    momentum, before = trainer.config.model.momentum, {name: p.numpy() for name, p in fresh.state_dict().items()}
    for (name, p), k in zip(fresh.encoder_q.named_parameters(), fresh.encoder_k.parameters()):
        if not p.stop_gradient:
            assert (found[f"encoder_q.{name}"] == before[f"encoder_q.{name}"]).all()
            assert (found[f"encoder_k.{name}"] == (k * momentum + p * (1.0 - momentum)).numpy()).all()
    assert not any(np.any(value) for value in checkpoint.load_optimizer(tmp_path / "latest").values())
    assert int(found["queue.pointer"]) == int(found["queue_dense.pointer"]) == 8
    assert all(np.isfinite(value).all() for value in found.values())
    assert float(trainer.scaler.state_dict()["scale"][0]) == 2.0**126


def test_the_loss_scale_is_saved_and_resumed(as_if_on_a_gpu, tmp_path):
    options = ["optim.amp=float16", "optim.max_iters=2"]
    _fit(tmp_path, *options, "optim.max_iters=1", scale=2.0**127)
    saved = json.loads((tmp_path / "latest.pdstates").read_text())["scaler"]
    assert saved["scale"] == [2.0**126]
    resumed, found = _fit(tmp_path, *options, resume="auto")
    whole, expected = _fit(tmp_path / "whole", *options, scale=2.0**127)
    _same(found, expected)
    for key, value in whole.scaler.state_dict().items():
        assert resumed.scaler.state_dict()[key] == value, key


@pytest.mark.parametrize("matching, products", [("backbone", 1), ("embedding", 1), ("random", 0)])
def test_losses_and_matches_are_computed_outside_autocast(monkeypatch, matching, products):
    """Similarities rounded to half precision would have equal maxima, and a sum over a queue would overflow."""
    paddle.seed(0)
    model = DenseCL("resnet18", 16, 8, queue_len=30, stages=1, matching=matching)
    seen, matmul = [], paddle.matmul

    def watched(*arguments, **options):
        seen.append(amp_state()["enable"])
        return matmul(*arguments, **options)

    monkeypatch.setattr(paddle, "matmul", watched)
    pair = [paddle.zeros([2, 32, 32, 3], "uint8")] * 2
    with paddle.amp.auto_cast(dtype="float16"):
        output = model(*pair)
    assert seen == [False] * (3 + 3 + products)  # three in each loss
    assert {output.loss.dtype, output.keys.dtype, output.keys_dense.dtype, model.queue.keys.dtype} == {paddle.float32}


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("bn_groups", [1, 2])
def test_the_encoders_alone_run_under_autocast(as_if_on_a_gpu, monkeypatch, tmp_path, level, bn_groups):
    trainer = Trainer(_config(tmp_path, "optim.amp=bfloat16", f"optim.amp_level={level}", f"model.bn_groups={bn_groups}"))
    seen = {}

    def watch(name, owner, attribute):
        function = getattr(owner, attribute)

        def watched(*arguments, **options):
            state = amp_state() or {"enable": False}
            seen.setdefault(name, set()).add((state["level"], state["dtype"]) if state["enable"] else None)
            return function(*arguments, **options)
        monkeypatch.setattr(owner, attribute, watched)

    watch("backbone", type(trainer.model.encoder_q.backbone), "forward")
    watch("head", type(trainer.model.encoder_q.head), "forward")
    watch("unit vectors", densecl.F, "normalize")
    watch("views", densecl, "normalise")
    watch("loss", densecl, "info_nce")
    watch("exchange", parallel.Shuffle, "restore")
    trainer.fit()
    inside = {(level, "bfloat16")}
    assert seen == {"backbone": inside, "head": inside, "unit vectors": {None}, "views": {None}, "loss": {None}, "exchange": {None}}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_embeddings_are_normalised_in_float32_whatever_they_came_as(dtype):
    x = np.random.default_rng(0).standard_normal((4, 32)).astype("float32") * 100
    short = paddle.to_tensor(x).astype(dtype)
    rows = normalised_rows(short)
    assert rows.dtype == paddle.float32
    wide = short.astype("float32").numpy()
    assert np.abs(rows.numpy() - wide / np.linalg.norm(wide, axis=1, keepdims=True)).max() < 1e-6


def test_all_of_a_mixed_run_is_kept_in_float32(as_if_on_a_gpu, tmp_path):
    """1 − m is below half precision's resolution: a key encoder kept in it would never move."""
    trainer, found = _fit(tmp_path, "optim.amp=bfloat16", "optim.max_iters=1")
    assert trainer.scaler is None  # bfloat16 has float32's range
    assert {value.dtype for value in found.values()} == {np.dtype("float32"), np.dtype("int64")}
    assert {value.dtype for value in checkpoint.load_optimizer(tmp_path / "latest").values()} == {np.dtype("float32")}


@pytest.fixture
def rounding_autocast(monkeypatch):
    """What no CPU has kernels for: within an enabled `auto_cast` the encoders' layers round all they take, the weights too, and all
    they give to its dtype, and so are their gradients; the sums inside a layer are float32's, as on tensor cores."""
    dtypes = [None]

    @contextlib.contextmanager
    def auto_cast(enable=True, dtype="float16", level="O1"):
        dtypes.append(dtype if enable else None)
        try:
            yield
        finally:
            dtypes.pop()

    def short(x):
        return x if dtypes[-1] is None or x is None else x.astype(dtypes[-1]).astype("float32")

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    monkeypatch.setattr(nn.Conv2D, "forward", lambda self, x: short(F.conv2d(
        short(x), short(self.weight), short(self.bias), self._stride, self._padding, self._dilation)))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: short(F.linear(short(x), short(self.weight), short(self.bias))))
    monkeypatch.setattr(nn.BatchNorm2D, "forward", lambda self, x, plain=nn.BatchNorm2D.forward: short(plain(self, short(x))))
    # Smooth: a ReLU or a maximum that decides otherwise is a jump, whose share grows with the root of the resolution.
    for name in ("relu", "relu_"):
        monkeypatch.setattr(F, name, lambda x: short(F.silu(short(x))))
    monkeypatch.setattr(nn.MaxPool2D, "forward", lambda self, x: F.avg_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("clip", [[], ["optim.clip_norm=0.5"]])
def test_a_mixed_run_is_the_plain_one_but_for_its_rounding(as_if_on_a_gpu, rounding_autocast, tmp_path, clip):
    """How far two steps' weights and queues end from those of the plain run, in parts of what the steps changed. float16 has
    8 times bfloat16's resolution: so much nearer it is, where rounding is all there is. Matched at random: by its features
    a near tie would be matched otherwise, and that is no small difference."""
    options = ["model.stages=2", "model.matching=random", "data.batch_size=8", "optim.max_iters=2", *clip]
    _, plain = _fit(tmp_path / "plain", *options)
    fresh = build_model(_config(tmp_path, *options))
    learning = [name for name, p in fresh.named_parameters() if name.startswith("encoder_q") and not p.stop_gradient]
    parts = {"weights": learning, "queue": ["queue.keys"], "queue_dense": ["queue_dense.keys"]}
    before, off = {name: x.numpy() for name, x in fresh.state_dict().items()}, {}
    for dtype in ("float16", "bfloat16"):
        _, mixed = _fit(tmp_path / dtype, *options, f"optim.amp={dtype}")
        for part, names in parts.items():
            distance, change = (np.sqrt(sum(((a[name] - plain[name]) ** 2).sum() for name in names)) for a in (mixed, before))
            off[part, dtype] = distance / change
    for part in parts:
        assert off[part, "bfloat16"] < 0.05 and 5 < off[part, "bfloat16"] / off[part, "float16"] < 12, off
