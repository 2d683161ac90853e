"""Recomputation changes the memory and the time of a step, and no bit of its numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.amp.auto_cast import amp_state

from ppdensecl.config import load_config
from ppdensecl.engine import checkpoint
from ppdensecl.engine.trainer import Trainer
from ppdensecl.models import DenseCL, ResNet

ROOT = Path(__file__).resolve().parent.parent
TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=20", "data.image_size=32", "data.batch_size=4",
        "data.workers=0", "model.queue_len=30", "model.hidden_dim=16", "model.embedding_dim=8", "model.stages=1",
        "log.visualdl=false", "optim.epochs=1"]


@pytest.fixture
def double():
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype("float32")


def _steps(recompute, backbone="resnet18", bn_groups=1, accumulate=1, count=3):
    """[loss of every forward pass], gradients of the last step, state after all steps."""
    paddle.seed(0)
    model = DenseCL(backbone, 16, 8, queue_len=30, momentum=0.9, bn_groups=bn_groups, stages=2)
    model.encoder_q.backbone.recompute = recompute
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, [p for p in model.parameters() if not p.stop_gradient], weight_decay=1e-4)
    rng = np.random.default_rng(0)
    losses = []
    for step in range(count):
        optimizer.clear_grad()
        model.update_key_encoder()
        outputs = []
        for _ in range(accumulate):
            pair = [paddle.to_tensor(rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)) for _ in range(2)]
            outputs.append(model(*pair, step=step))
            (outputs[-1].loss / accumulate).backward()
            losses.append(float(outputs[-1].loss))
        optimizer.step()
        for output in outputs:
            model.enqueue(output)
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
    return losses, grads, {name: value.numpy() for name, value in model.state_dict().items()}


def _identical(a, b):
    (losses, *arrays), (expected_losses, *expected) = a, b
    assert losses == expected_losses
    for found, wanted in zip(arrays, expected):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert (found[name] == wanted[name]).all(), name


@pytest.mark.parametrize("bn_groups, accumulate", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_losses_gradients_weights_and_statistics_are_the_same(bn_groups, accumulate):
    plain, again = (_steps(recompute, bn_groups=bn_groups, accumulate=accumulate) for recompute in (0, 2))
    _identical(again, plain)
    moved = np.abs(plain[2]["encoder_q.backbone.layer1.0.bn1._mean"]).max()
    assert moved > 1e-3  # or equal statistics would say nothing


def test_bottlenecks_are_the_same():
    plain = _steps(0, "resnet50", count=2)
    for stages in (1, 2):
        _identical(_steps(stages, "resnet50", count=2), plain)


def test_float64_is_the_same(double):
    plain = _steps(0, bn_groups=2)
    assert plain[1]["encoder_q.backbone.conv1.weight"].dtype == np.float64
    _identical(_steps(2, bn_groups=2), plain)


def test_an_input_with_a_gradient_gets_it():
    grads = []
    for recompute in (0, 2):
        paddle.seed(0)
        net = ResNet(18, stages=2)
        net.recompute = recompute
        x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype("float32"), stop_gradient=False)
        (net(x) ** 2).mean().backward()
        grads.append(x.grad.numpy())
    assert (grads[0] == grads[1]).all() and np.abs(grads[0]).max() > 0


def _watched(recompute):
    """The autocast settings each of the query's convolutions was called under."""
    paddle.seed(0)
    model = DenseCL("resnet18", 16, 8, queue_len=30, stages=1)
    model.encoder_q.backbone.recompute = recompute
    seen = []

    def note(layer, *_):
        seen.append((layer, amp_state() and (amp_state()["enable"], amp_state()["level"], amp_state()["dtype"])))

    for encoder in (model.encoder_q, model.encoder_k):
        for layer in encoder.backbone.sublayers():
            if isinstance(layer, paddle.nn.Conv2D):
                layer.register_forward_post_hook(note)
    pair = [paddle.zeros([2, 32, 32, 3], "uint8")] * 2
    with paddle.amp.auto_cast(dtype="bfloat16"):
        loss = model(*pair).loss
    loss.backward()
    return seen


@pytest.mark.filterwarnings("ignore:amp_guard can only be enabled")
def test_only_the_query_runs_again_and_under_the_autocast_of_its_first_time():
    once, twice = _watched(0), _watched(1)
    assert len(once) == 2 * 5 and len(twice) == 3 * 5  # convolutions of a one-stage ResNet-18
    assert {settings for _, settings in twice} == {(True, "O1", "bfloat16")}


def test_the_momenta_of_batchnorm_come_back_even_from_a_failure():
    paddle.seed(0)
    net = ResNet(18, stages=1)
    net.recompute = 1
    y = net(paddle.randn([2, 3, 32, 32]))

    def fail(*_):
        raise RuntimeError("on purpose")

    net.layer1[1].bn2.register_forward_post_hook(fail)
    with pytest.raises(Exception, match="on purpose"):
        y.mean().backward()
    assert {layer._momentum for layer in net.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)} == {0.9}


def _train(folder, *overrides, processes=1):
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", str(folder / "log")]
    command = [sys.executable, *(launch if processes > 1 else []), "tools/train.py", *TINY, f"output_dir={folder}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return checkpoint.load_weights(folder / "latest")


@pytest.mark.parametrize("stages", [0, 1])
def test_the_config_turns_it_on_for_the_query_alone(tmp_path, stages):
    trainer = Trainer(load_config(ROOT / TINY[1], [*TINY[3:], f"output_dir={tmp_path}", f"optim.recompute={stages}"]))
    trainer.loader.close()
    assert trainer.model.encoder_q.backbone.recompute == stages and not trainer.model.encoder_k.backbone.recompute


def test_two_processes_train_to_the_same_weights(tmp_path):
    """Gradients that travel between processes, of parameters used twice in a pass (bn_groups) and in two passes."""
    options = ["optim.accumulate=2", "model.bn_groups=2", "optim.max_iters=1", "optim.epochs=2"]
    plain, again = (_train(tmp_path / stages, *options, f"optim.recompute={stages}", processes=2) for stages in "01")
    for name in plain:
        assert (plain[name] == again[name]).all(), name


def test_a_run_may_be_resumed_with_it(tmp_path):
    _train(tmp_path, "optim.max_iters=1")
    resumed = _train(tmp_path, "optim.recompute=1", "optim.max_iters=2", "--resume")
    whole = _train(tmp_path / "whole", "optim.max_iters=2")
    for name in whole:
        assert (whole[name] == resumed[name]).all(), name
