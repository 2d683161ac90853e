import math

import numpy as np
import paddle
import pytest

from ppdensecl.config import OptimConfig
from ppdensecl.engine.optimisation import build_optimizer, learning_rate
from ppdensecl.models import DenseCL


def test_cosine_per_epoch_is_the_released_runs():
    optim = OptimConfig(lr=0.3, epochs=800)
    rates = [learning_rate(optim, epoch * 7 + 6, 7) for epoch in range(800)]
    assert rates[0] == 0.3 and rates == [learning_rate(optim, epoch * 7, 7) for epoch in range(800)]
    assert abs(rates[-1] - 1.157e-6) < 1e-9  # in the posted log
    assert abs(rates[400] - 0.15) < 1e-12


def test_other_schedules():
    per_iter = OptimConfig(lr=1.0, epochs=10, lr_step="iter")
    assert abs(learning_rate(per_iter, 25, 10) - 0.5 * (1 + math.cos(math.pi * 0.25))) < 1e-12
    cut = OptimConfig(lr=1.0, epochs=10, lr_step="iter", max_iters=50)
    assert learning_rate(cut, 25, 10) == learning_rate(per_iter, 25, 10)
    step = OptimConfig(lr=1.0, schedule="step", milestones=[2, 4])
    assert [round(learning_rate(step, i, 10), 6) for i in (19, 20, 39, 40)] == [1, 0.1, 0.1, 0.01]
    warm = OptimConfig(lr=1.0, schedule="constant", warmup_epochs=2)
    assert [learning_rate(warm, i, 10) for i in (0, 9, 19, 30)] == [0.05, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_and_momentum_are_sgd_as_pytorch_defines_it(everything):
    paddle.seed(0)
    model = DenseCL("resnet18", 16, 8, queue_len=8)
    optim = OptimConfig(lr=0.1, weight_decay=0.01, momentum=0.9, decay_norm_and_bias=everything)
    optimizer = build_optimizer(optim, model)
    learning = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    assert set(learning) == {name for name, p in model.encoder_q.named_parameters("encoder_q") if not p.stop_gradient}
    expected = {name: (p.numpy().copy(), 0.0) for name, p in learning.items()}
    for step in range(3):
        for i, p in enumerate(learning.values()):
            (p * float(i + step)).sum().backward()
        optimizer.step(), optimizer.clear_grad()
        for i, (name, p) in enumerate(learning.items()):
            value, velocity = expected[name]
            decay = 0.01 if everything or value.ndim > 1 else 0.0
            velocity = 0.9 * velocity + (i + step) + decay * value
            expected[name] = value - 0.1 * velocity, velocity
            assert np.allclose(p.numpy(), expected[name][0], atol=2e-5 * (1 + i)), name


@pytest.mark.parametrize("everything", [True, False])
def test_the_norm_that_is_clipped_is_of_all_gradients(everything):
    paddle.seed(0)
    model = DenseCL("resnet18", 16, 8, queue_len=8, stages=1)
    optimizer = build_optimizer(OptimConfig(lr=1.0, weight_decay=0.0, momentum=0.0, clip_norm=1.0,
                                            decay_norm_and_bias=everything), model)
    learning = [p for p in model.parameters() if not p.stop_gradient]
    before = [p.numpy().copy() for p in learning]
    sum(p.sum() for p in learning).backward()
    optimizer.step()
    step = np.concatenate([(b - p.numpy()).ravel() for b, p in zip(before, learning)])
    assert abs(np.linalg.norm(step.astype("float64")) - 1) < 1e-3 and abs(step * len(step) ** 0.5 - 1).max() < 0.05
