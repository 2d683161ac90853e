"""Which views of other pictures are nearest to a view of a picture?"""

from __future__ import annotations

import numpy as np

from ppdensecl.evaluation import knn
from ppdensecl.visual.figure import frame, plain_axes, save

_NEAREST = 5


def draw_retrieval(views, pooled, shown, path):
    """Writes the first views of some pictures beside the nearest of the second views of all pictures as a PNG.

    views uint8 [2, n, h, w, 3]; pooled {name of a backbone: float32 [2, n, C]}; shown: numbers of pictures, a row for each.
    """
    from matplotlib.figure import Figure

    count, height, width = views.shape[1:4]
    nearest = min(_NEAREST, count)
    figure = Figure(figsize=(1.15 * (1 + len(pooled) * _NEAREST) + 0.3, 0.9 + len(shown) * (0.25 + 1.1 * height / width)),
                    layout="constrained")
    blocks = figure.subfigures(1, 1 + len(pooled), wspace=0.03, width_ratios=[1, *[_NEAREST] * len(pooled)])
    axes = plain_axes(blocks[0], len(shown), 1)
    blocks[0].suptitle("view", fontsize=10)
    for axis, i in zip(axes[:, 0], shown):
        axis.imshow(views[0, i])
        axis.set_title(" ", fontsize=8)  # as high as its neighbours
    for block, (name, (first, second)) in zip(blocks[1:], pooled.items()):
        cosine, found = knn.neighbours(second, first, nearest)
        right = (found[:, 0] == np.arange(count)).sum()
        block.suptitle(f"{name}: the same picture comes first for {right} of {count} ({100 * right / count:.1f} %)", fontsize=10)
        for line, i in zip(plain_axes(block, len(shown), _NEAREST), shown):
            for axis, j, near in zip(line, found[i], cosine[i]):
                axis.imshow(views[1, j])
                axis.set_title(f"{near:.3f}", fontsize=8)
                if j == i:
                    frame(axis, 0, 0, width, height, "lime")
    figure.suptitle(f"A view of a picture, and the {nearest} most similar of the other views of {count} pictures (cosine of "
                    "pooled features)\ngreen: the other view of the same picture; by chance it comes first for "
                    f"{100 / count:.1f} %", fontsize=11)
    save(figure, path)
