"""SGD as the recipes have it, and the learning rate as a pure function of the iteration."""

import math

import paddle


def learning_rate(optim, iteration, iters_per_epoch):
    """The learning rate of an iteration (0-based, counted in optimizer steps).

    The released runs step a cosine once per epoch (lr_step epoch): epoch e of E has lr · (1 + cos(π·e/E)) / 2. With lr_step
    iter the same runs over iterations. `milestones` of schedule step are counted in the same unit. A warm-up multiplies by
    a line from 0 to 1, iteration by iteration. `max_iters` has no part in it: such a run is the beginning of the whole one.
    """
    if optim.lr_step == "epoch":
        at, length = iteration // iters_per_epoch, optim.epochs
    else:
        at, length = iteration, optim.epochs * iters_per_epoch
    if optim.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * min(at, length) / length))
    elif optim.schedule == "step":
        factor = optim.gamma ** sum(at >= milestone for milestone in optim.milestones)
    else:
        factor = 1.0
    warmup = optim.warmup_epochs * iters_per_epoch
    return optim.lr * factor * min(1.0, (iteration + 1) / warmup if warmup else 1.0)


def build_optimizer(optim, model):
    """Momentum SGD over the parameters that learn; v ← μ·v + (g + wd·p), p ← p − lr·v, as PyTorch's."""
    learning = [(name, p) for name, p in model.named_parameters() if not p.stop_gradient]
    if optim.decay_norm_and_bias:
        parameters = [p for _, p in learning]
    else:  # vectors are BatchNorm's scale and shift, and biases
        parameters = [{"params": [p for _, p in learning if p.ndim > 1]},
                      {"params": [p for _, p in learning if p.ndim <= 1], "weight_decay": 0.0}]
    clip = paddle.nn.ClipGradByGlobalNorm(optim.clip_norm) if optim.clip_norm else None
    return paddle.optimizer.Momentum(optim.lr, optim.momentum, parameters, weight_decay=optim.weight_decay, grad_clip=clip)
