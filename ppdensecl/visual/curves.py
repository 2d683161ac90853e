"""The curves of a run, from its train.log."""

import math
import re

from ppdensecl.errors import UserError

_LINE = re.compile(r"epoch: (\d+)/\d+, iter: (\d+)/(\d+), (.*)")
_FIELD = re.compile(r"([a-z_]+): ([-+\d.e]+|nan|inf)")


def read_log(path):
    """The logged lines of a train.log as {field: [value, …]}, with `iteration` counted over all epochs.

    Where a run was resumed, lines that were trained again count once. Raises UserError.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [match for match in map(_LINE.search, file) if match]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    rows = {}
    for match in lines:
        epoch, position, per_epoch = (int(match.group(i)) for i in (1, 2, 3))
        rows[(epoch - 1) * per_epoch + position] = {name: float(value) for name, value in _FIELD.findall(match.group(4))}
    if not rows:
        raise UserError(f"{path}: has no logged iterations; train first")
    names = sorted(set.intersection(*(set(row) for row in rows.values())))
    order = sorted(rows)
    return {"iteration": order, **{name: [rows[i][name] for i in order] for name in names}}


def draw_curves(log, queue_len, path):
    """Draws losses, accuracies against the queue, similarities and learning rate of `read_log`'s result as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True, sharex=True)
    panels = (
        (axes[0, 0], "InfoNCE loss", ("loss_global", "loss_dense")),
        (axes[0, 1], "share", ("accuracy", "dense_accuracy", "matched_share")),
        (axes[1, 0], "mean cosine similarity", ("positive", "negative", "dense_positive", "dense_negative")),
        (axes[1, 1], "learning rate", ("lr",)),
    )
    names = {"loss_global": "global", "loss_dense": "dense", "accuracy": "global: positive beats the queue",
             "dense_accuracy": "dense: positive beats the queue", "matched_share": "matched to own position", "lr": "lr",
             "positive": "global, positive", "negative": "global, negatives", "dense_positive": "dense, positive",
             "dense_negative": "dense, negatives"}
    for axis, label, fields in panels:
        for field in fields:
            if field in log:
                axis.plot(log["iteration"], log[field], label=names[field], linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].axhline(math.log(1 + queue_len), color="grey", linestyle="--", linewidth=1, label="chance: ln(1 + K)")
    for axis in axes.flat[:3]:
        axis.legend(fontsize=8)
    axes[0, 1].set_ylim(-0.03, 1.03)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.savefig(path, dpi=110)
    plt.close(figure)
