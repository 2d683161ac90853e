"""The learning rate of every step against PyTorch's schedulers, and how fresh weights are distributed against PyTorch's."""

import compare
import numpy as np
import reference
import torch

import paddle
from ppdensecl.config import OptimConfig
from ppdensecl.engine.optimisation import learning_rate
from ppdensecl.interop import layouts
from ppdensecl.models import DenseCL

ITERS_PER_EPOCH = 7
SAMPLE = 200_000  # numbers of a tensor that are compared


def learning_rates():
    """Every step of the released schedules and of the others; PyTorch's cosine is a recursion, whose rounding adds up."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    step = torch.optim.lr_scheduler.MultiStepLR
    cases = {
        "cosine by epoch, 200 epochs from 0.03": (dict(lr=0.03, epochs=200), cosine, dict(T_max=200)),
        "cosine by epoch, 800 epochs from 0.3": (dict(lr=0.3, epochs=800), cosine, dict(T_max=800)),
        "cosine by iteration": (dict(lr=0.03, epochs=200, lr_step="iter"), cosine, dict(T_max=200 * ITERS_PER_EPOCH)),
        "steps at epochs 120 and 160": (dict(lr=0.03, epochs=200, schedule="step", milestones=[120, 160]), step,
                                        dict(milestones=[120, 160])),
    }
    found = []
    for name, (options, scheduler, arguments) in cases.items():
        config = OptimConfig(**options)
        iterations = config.epochs * ITERS_PER_EPOCH
        ours = [learning_rate(config, i, ITERS_PER_EPOCH) for i in range(iterations)]
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config.lr)
        schedule, theirs = scheduler(optimizer, **arguments), []
        for i in range(iterations):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if config.lr_step == "iter" or (i + 1) % ITERS_PER_EPOCH == 0:
                schedule.step()
        found.append(compare.row("schedule", f"learning rate/{name}", "float64", ours, theirs, 1e-12 * config.lr,
                                 why="1e-12 of the first rate: the rounding of a recursion"))
    return found


def initialisation(depth=50, seed=0):
    """Our fresh weights against PyTorch's, layer by layer: what is random by the Kolmogorov-Smirnov distance of two samples
    (the largest difference of their cumulative distributions), at a level that one comparison in a million exceeds by chance;
    what is constant exactly; the key encoder must be a copy of the query encoder."""
    paddle.seed(seed)
    torch.manual_seed(seed)
    ours = {name: value.numpy() for name, value in DenseCL(f"resnet{depth}", queue_len=1024).state_dict().items()}
    model = reference.DenseCL(depth, 2048, 128, 1024, None, 0.5, 0, "backbone", 0.999, 0.2)
    theirs = layouts.from_torch({name: value.numpy() for name, value in model.state_dict().items()})
    found = []
    for name, value in ours.items():
        if name.startswith("encoder_k"):
            continue
        a, b = (_sample(x) for x in (value, theirs[name]))
        if np.ptp(b) == 0:
            found.append(compare.row("start", f"initialisation/{name}", "float32", value, theirs[name], 0, why="constant"))
            continue
        bound = np.sqrt(-0.5 * np.log(0.5e-6) * (1 / len(a) + 1 / len(b)))
        found.append(compare.row("start", f"initialisation/{name}", "float32", [_distance(a, b)], [0.0], bound,
                                 why=f"distance of distributions; deviation {a.std():.4g} and {b.std():.4g}"))
    copies = [np.abs(ours[name] - ours[name.replace("encoder_q", "encoder_k")]).max() for name in ours if "encoder_q" in name]
    found.append(compare.row("start", "initialisation/key encoder minus query encoder", "float32", copies,
                             np.zeros(len(copies)), 0))
    return found


def _sample(x):
    x = x.ravel()
    return np.sort(x[::max(1, x.size // SAMPLE)])


def _distance(a, b):
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()
