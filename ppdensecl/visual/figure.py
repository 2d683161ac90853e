"""Figures as PNG files that are either whole or not there."""

from __future__ import annotations

from ppdensecl.files import replacing


def sheet(rows, columns, width, height):
    """A matplotlib Figure of width × height inches, and its `plain_axes`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, plain_axes(figure, rows, columns)


def plain_axes(figure, rows, columns):
    """Axes [rows, columns] of a figure, or of a part of one, for pictures: without frames and ticks."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return axes


def frame(axis, left, top, width, height, colour):
    """A frame around so many pixels of the picture on an axis, seen on any ground."""
    from matplotlib.patches import Rectangle

    for edge, thickness in (("black", 3.5), (colour, 1.8)):
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=edge, linewidth=thickness))


def save(figure, path, named=None):
    """Writes a Figure as a PNG to `path`; `named` is what an error calls it. Raises UserError."""
    with replacing(path, named) as file:
        figure.savefig(file, format="png", dpi=110)
