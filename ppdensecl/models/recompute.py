"""Memory for time: results that are computed again in the backward pass instead of being kept (Chen et al., "Training Deep
Nets with Sublinear Memory Cost", 2016). The numbers are those of keeping them."""

import contextlib

import paddle
from paddle import nn
from paddle.amp.auto_cast import amp_state
from paddle.autograd import PyLayer

AUTOCAST = ("enable", "custom_white_list", "custom_black_list", "level", "dtype")


class _Recompute(PyLayer):
    # The parameters are inputs, so that their gradients travel through the outer graph like any other's: each is complete
    # when paddle.DataParallel's hook sees it, however often a parameter is used, and it sees it once.
    @staticmethod
    def forward(ctx, x, function, norms, *parameters):
        ctx.function, ctx.norms, ctx.parameters = function, norms, parameters
        ctx.autocast = amp_state() and {key: amp_state()[key] for key in AUTOCAST}
        ctx.save_for_backward(x)
        with paddle.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensor()
        again = x.detach()
        again.stop_gradient = x.stop_gradient
        autocast = paddle.amp.auto_cast(**ctx.autocast) if ctx.autocast else contextlib.nullcontext()
        with paddle.enable_grad(), autocast, _statistics_held(ctx.norms):
            y = ctx.function(again)
        if x.stop_gradient:
            return (None, *paddle.grad([y], list(ctx.parameters), [grad]))
        return tuple(paddle.grad([y], [again, *ctx.parameters], [grad]))


@contextlib.contextmanager
def _statistics_held(norms):
    """The running statistics have seen this batch already; at momentum 1 they stay bit for bit."""
    momenta = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm._momentum = momentum


def recompute(function, layers, x):
    """function(x), of which only x is kept for the backward pass.

    Args:
        function: one tensor to one tensor, without random numbers.
        layers: all whose parameters it uses.
        x: its input, with or without a gradient.
    """
    norms = [inner for layer in layers for inner in layer.sublayers(include_self=True)
             if isinstance(inner, (nn.BatchNorm2D, nn.SyncBatchNorm))]
    return _Recompute.apply(x, function, norms, *(p for layer in layers for p in layer.parameters() if not p.stop_gradient))
