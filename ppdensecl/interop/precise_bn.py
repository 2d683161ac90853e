"""Precise BN: BatchNorm's running statistics of a trained network, estimated anew with its weights as they are.

In training the weights change under the running average, so that it belongs to no network that ever was. The paper's
detection runs estimate it anew before the test.
"""

from __future__ import annotations

import itertools
import os

import paddle
from paddle import nn

from ppdensecl import parallel
from ppdensecl.errors import UserError

BATCHES = 200  # detectron2's TEST.PRECISE_BN.NUM_ITER
_NORMS = (nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout2D, nn.Dropout3D, nn.AlphaDropout)


@paddle.no_grad()
def estimate(model, batches):
    """Sets the running statistics of each BatchNorm to averages over `batches`; calls model(batch) for each of them.

    The mean is the plain average of the batches' means. The variance is the plain average of the batches' variances, each
    about the mean of its own batch and as Paddle takes it (divided by n); how the means spread is not added. Where one
    BatchNorm is called several times in a forward pass, each call counts as a batch. Under several ranks each has batches
    of its own, equally many, and the averages are over all of them.

    The network is in training mode meanwhile, but for dropout, which is off. A BatchNorm that uses its running statistics
    in training too (`use_global_stats`) keeps them, and so does one that is never called. All else, modes included, is
    afterwards as it was; after an error the statistics are, too.

    Returns (BatchNorms estimated, BatchNorms that the model has). Raises UserError where statistics are not finite.
    Source: facebookresearch/fvcore, precise_bn.py (update_bn_stats), which detectron2's PreciseBN hook calls.
    """
    layers = model.sublayers(include_self=True)
    norms = [layer for layer in layers if isinstance(layer, _NORMS)]
    moving = [layer for layer in norms if not layer._use_global_stats]
    modes, momenta = [layer.training for layer in layers], [layer._momentum for layer in moving]
    before = [(layer._mean.clone(), layer._variance.clone()) for layer in moving]
    sums = {layer: paddle.zeros([2 * layer._mean.shape[0] + 1], "float64") for layer in moving}

    def add(layer, inputs, output):
        one = paddle.ones([1], "float64")
        sums[layer] += paddle.concat([layer._mean.astype("float64"), layer._variance.astype("float64"), one])

    hooks, found = [layer.register_forward_post_hook(add) for layer in moving], before
    try:
        model.train()
        for layer in layers:
            layer.training = layer.training and not isinstance(layer, _DROPOUTS)
        for layer in moving:
            layer._momentum = 0.0  # then the running statistics are the batch's
        for batch in batches:
            model(batch)
        found = _averages(moving, sums, before)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in zip(layers, modes):
            layer.training = mode
        for layer, momentum, (mean, variance) in zip(moving, momenta, found):
            layer._momentum = momentum
            layer._mean.set_value(mean)
            layer._variance.set_value(variance)
    return sum(new is not old for new, old in zip(found, before)), len(norms)


def _averages(layers, sums, before):
    """[(mean, variance)] of `layers` over all ranks; of those never called, `before`."""
    if not layers:
        return before
    flat = parallel.gather(paddle.concat([sums[layer] for layer in layers]).unsqueeze(0)).sum(0)
    if not bool(paddle.isfinite(flat).all()):
        raise UserError("the statistics of the batches are not finite; the network has diverged, use an earlier checkpoint")
    found = []
    for layer, part, old in zip(layers, flat.split([len(sums[layer]) for layer in layers]), before):
        channels, calls = (len(part) - 1) // 2, float(part[-1])
        average = (part[:-1] / max(calls, 1)).astype(layer._mean.dtype)
        found.append((average[:channels], average[channels:]) if calls else old)
    return found


def repeated(loader, count):
    """The next `count` batches of a loader that is not empty; where it ends it begins again."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count)


def check_output(out, source):
    """Raises UserError where `out` cannot become the .pdparams with the new statistics of the file `source`."""
    if not str(out).endswith(".pdparams"):
        raise UserError(f"{out}: give a file to write that ends in .pdparams")
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        raise UserError(f"{out}: is the file that is read; give another one to write")
