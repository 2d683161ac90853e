"""The linear probe: one layer on frozen pooled features, as MoCo and DenseCL are compared on ImageNet.

The recipe (He et al., "Momentum Contrast", CVPR 2020): SGD with momentum 0.9 and without weight decay, learning rate 30, batches
of 256, 100 epochs, a tenth of the rate from 60 and from 80 % of them on. It is that large because pooled features are small; where
they have another scale, give several and the best on a tenth of the training pictures is taken.
"""

import numpy as np
import paddle
import paddle.nn.functional as F

from ppdensecl.errors import UserError

MILESTONES = (0.6, 0.8)  # of the epochs


def rate(lr, epoch, epochs):
    """The learning rate of an epoch, from 0."""
    return lr * 0.1 ** sum(epoch >= round(milestone * epochs) for milestone in MILESTONES)


def order(seed, epoch, count, batch_size):
    """The pictures of an epoch in batches that differ by one at most: no last batch of a single picture."""
    return np.array_split(np.random.default_rng([seed, 2, epoch]).permutation(count), -(-count // batch_size))


def rows(features, labels, chosen, seed, batch_size):
    """For `fit`: epochs over the rows `chosen` of features [n, C] (a memory map) and labels int64 [n]."""
    def epoch_of(epoch):
        for group in order(seed, epoch, len(chosen), batch_size):
            where = np.sort(chosen[group])  # a disk likes it in order; the sum over a batch does not care
            yield features[where], labels[where]
    return epoch_of


def fit(epoch_of, width, classes, rates, epochs, seed):
    """Heads [nn.Linear(width, classes)], one for each learning rate in `rates`, trained side by side on the same batches.

    epoch_of(epoch) gives (float32 [b, width], int64 [b]) after another.
    """
    paddle.seed(seed)
    heads = [paddle.nn.Linear(width, classes, weight_attr=paddle.nn.initializer.Normal(0, 0.01)) for _ in rates]
    optimizers = [paddle.optimizer.Momentum(lr, 0.9, head.parameters()) for lr, head in zip(rates, heads)]
    for epoch in range(epochs):
        for lr, optimizer in zip(rates, optimizers):
            optimizer.set_lr(rate(lr, epoch, epochs))
        for features, labels in epoch_of(epoch):
            x, y = paddle.to_tensor(features), paddle.to_tensor(labels)
            for head, optimizer in zip(heads, optimizers):
                F.cross_entropy(head(x), y).backward()
                optimizer.step()
                optimizer.clear_grad()
    return heads


@paddle.no_grad()
def predict(head, features, block=4096):
    """Scores float32 [n, classes] of features [n, C]."""
    return np.concatenate([head(paddle.to_tensor(features[start : start + block])).numpy()
                           for start in range(0, len(features), block)])


def accuracy(scores, labels, top=1):
    """Share of rows whose label is among the `top` highest scores; scores that are not finite are wrong."""
    best = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    return float(((best == labels[:, None]).any(1) & np.isfinite(scores).all(1)).mean())


def held_out(labels, seed):
    """bool [n]: a tenth of each class (one picture at least, where it has two), to choose a learning rate by."""
    held = np.zeros(len(labels), bool)
    rng = np.random.default_rng([seed, 3])
    for label in np.unique(labels):
        where = rng.permutation(np.flatnonzero(labels == label))
        held[where[: max(1, len(where) // 10) if len(where) > 1 else 0]] = True
    return held


def probe(epochs_over, features_of, labels, test, truth, classes, rates, epochs, seed):
    """Trains and scores: {"accuracy", "top5", "lr", "held_out"}; held_out is {lr: accuracy} of the choice among several.

    Args:
        epochs_over: indices → what `fit` iterates over, of these training pictures.
        features_of: indices → features [n, C] of the unaugmented training pictures, to choose a rate by.
        labels, truth: int64 [n], [m] of the training and test pictures.
        test: features [m, C].
    """
    chosen, choice = rates[0], {}
    if len(rates) > 1:
        held = held_out(labels, seed)
        heads = fit(epochs_over(np.flatnonzero(~held)), test.shape[1], classes, rates, epochs, seed)
        seen = features_of(np.flatnonzero(held))
        choice = {lr: accuracy(predict(head, seen), labels[held]) for lr, head in zip(rates, heads)}
        chosen = max(rates, key=choice.get)
    head, = fit(epochs_over(np.arange(len(labels))), test.shape[1], classes, [chosen], epochs, seed)
    scores = predict(head, test)
    if not np.isfinite(scores).all():
        raise UserError(f"--lr {chosen:g}: the linear layer diverged; give smaller rates, for example --lr 3 0.3")
    return {"accuracy": accuracy(scores, truth), "top5": accuracy(scores, truth, min(5, classes)), "lr": chosen,
            "held_out": {f"{lr:g}": share for lr, share in choice.items()}}
