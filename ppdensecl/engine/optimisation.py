"""SGD as the recipes have it, its state under names that last, and the learning rate as a pure function of the iteration."""

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
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    if not optim.decay_norm_and_bias:
        for p in parameters:
            if p.ndim <= 1:  # BatchNorm's scale and shift, and biases
                p.regularizer = paddle.regularizer.L2Decay(0.0)  # and no group of their own: the norm would be clipped by group
    clip = paddle.nn.ClipGradByGlobalNorm(optim.clip_norm) if optim.clip_norm else None
    return paddle.optimizer.Momentum(optim.lr, optim.momentum, parameters, weight_decay=optim.weight_decay, grad_clip=clip)


# Paddle names an accumulator after a parameter's running number in this process (`conv2d_3.w_0_velocity_0`); a checkpoint names
# it after the parameter's place in the model (`encoder_q.backbone.conv1.weight/velocity_0`).


def lasting_names(model, state):
    """The state dict of an optimizer of `model` as a checkpoint has it: {name: array}."""
    places, renamed = _places(model), {}
    for key, value in state.items():
        if isinstance(value, paddle.Tensor):
            owner = max((p for p in places if key.startswith(f"{p}_")), key=len, default=None)
            renamed[key if owner is None else f"{places[owner]}/{key[len(owner) + 1:]}"] = value.numpy()
    return renamed


def own_names(model, arrays):
    """What `lasting_names` gave, for an optimizer of `model` in this process: {name: tensor}."""
    ours, renamed = {place: name for name, place in _places(model).items()}, {}
    for key, value in arrays.items():
        place, slash, kind = key.partition("/")
        renamed[f"{ours[place]}_{kind}" if slash and place in ours else key] = paddle.to_tensor(value)
    return renamed


def _places(model):
    """{Paddle's name of a parameter that learns: its place in the model}"""
    return {p.name: name for name, p in model.named_parameters() if not p.stop_gradient}
