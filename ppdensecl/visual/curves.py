"""The curves of a run, from its train.log."""

from __future__ import annotations

import math
import re

from ppdensecl.errors import UserError
from ppdensecl.visual.figure import save

_NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|-?inf"
# A full disk or a kill cuts a line short, and the next one goes on behind it: the last one of a line counts, if it has its end.
_LINE = re.compile(r".*epoch: (\d{1,9})/\d+, iter: (\d{1,9})/(\d{1,9}), (.*), eta: \d+:\d\d:\d\d$")
_FIELD = re.compile(rf"([a-z_]+): ({_NUMBER})")
_CORRESPONDENCE = re.compile(rf"correspondence at iteration (\d{{1,9}})/\d+: ({_NUMBER}), chance ({_NUMBER}), "
                             rf"own position ({_NUMBER}), where that is wrong (\d\.\d{{4}}|nan)$")


def read_log(path):
    """The logged lines of a train.log as {field: [value, …]}, with `iteration` counted over all epochs.

    A field is None where a line lacks it, as where a run went on with another loss_lambda. Lines that were cut short do not
    count; where a run was resumed, lines that were trained again count once. Raises UserError.
    """
    rows = {}
    for match in filter(None, map(_LINE.search, read_lines(path))):
        epoch, position, per_epoch = (int(match.group(i)) for i in (1, 2, 3))
        rows[(epoch - 1) * per_epoch + position] = {name: float(value) for name, value in _FIELD.findall(match.group(4))}
    if not rows:
        raise UserError(f"{path}: has no logged iterations; train first")
    names = sorted(set().union(*rows.values()))
    order = sorted(rows)
    return {"iteration": order, **{name: [rows[i].get(name) for i in order] for name in names}}


def read_correspondence(path):
    """The checks of dense matches in a train.log: {"iteration": […], "right": […], "chance": […], "own": […], "elsewhere": […]},
    the shares of `evaluation.correspondence.Matched`; empty where it has none.

    Of two lines of one iteration the later counts, as after a resume. Raises UserError.
    """
    rows = {int(match.group(1)): tuple(map(float, match.groups()[1:]))
            for match in filter(None, map(_CORRESPONDENCE.search, read_lines(path)))}
    order = sorted(rows)
    return {"iteration": order, **{name: [rows[i][column] for i in order]
                                   for column, name in enumerate(("right", "chance", "own", "elsewhere"))}}


def read_lines(path):
    """The lines of a train.log. Raises UserError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None


_PANELS = (  # (title, what the y axis counts, {field: its line's name})
    ("losses", "InfoNCE loss", {"loss_global": "global", "loss_dense": "dense"}),
    ("accuracy: the positive beats all of the queue", "share of queries",
     {"accuracy": "global: pictures", "dense_accuracy": "dense: cells"}),
    ("where query cells are matched to", "share of query cells", {"matched_share": "their own position in the key view"}),
    ("similarity of embeddings", "mean cosine", {
        "positive": "global, positives", "negative": "global, negatives", "dense_positive": "dense, positives",
        "dense_negative": "dense, negatives"}),
    ("learning rate", "learning rate", {"lr": None}),
    ("speed", "pictures / s", {"avg_ips": None}),
)


def draw_curves(log, correspondence, queue_len, path):
    """Draws the results of `read_log` and `read_correspondence` as a PNG of six panels. Raises UserError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = list(figure.subplots(2, 3, sharex=True).flat)
    for axis, (title, label, fields) in zip(axes, _PANELS):
        for field, name in fields.items():
            if field in log:
                known = len(log[field]) - log[field].count(None)
                axis.plot(log["iteration"], log[field], ".-" if known < 3 else "-", label=name, linewidth=1.2)
        axis.set(title=title, ylabel=label)
        axis.grid(alpha=0.3)
    losses, accuracy, matched, _, _, speed = axes
    losses.axhline(math.log(1 + queue_len), color="grey", linestyle="--", linewidth=1, label=f"chance: ln(1 + {queue_len})")
    accuracy.axhline(1 / (1 + queue_len), color="grey", linestyle="--", linewidth=1, label=f"chance: 1 / (1 + {queue_len})")
    if correspondence["iteration"]:
        for name, style, label in (("right", "o-C2", "within one cell of the truth (larger views)"), ("own", "--C2", "if each took its "
                                   "own position"), ("elsewhere", "o-C3", "within one cell, where its own position is not"),
                                   ("chance", ":k", "a random match")):
            matched.plot(correspondence["iteration"], correspondence[name], style, markersize=4, linewidth=1.2, label=label)
    for axis in (accuracy, matched):
        axis.set_ylim(-0.03, 1.03)
    speed.set_ylim(0, 1.05 * speed.get_ylim()[1])
    for axis in axes:
        axis.xaxis.set_tick_params(labelbottom=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("iteration")
        if axis.get_legend_handles_labels()[0]:  # below the panel, where it hides no curve
            axis.legend(fontsize=8, ncols=1 if axis is matched else 2, loc="upper center", bbox_to_anchor=(0.5, -0.14),
                        frameon=False)
    save(figure, path)
