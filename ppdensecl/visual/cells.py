"""What the cells of two views of a picture say to each other: matches, mutual matches, and one cell's similarity to all.

Each picture has a trained backbone and a random start of the same architecture below or beside each other: a random network
sees by zero padding where a cell is, and matches better than chance. `backbones` is {name: backbone}, `view` whatever
`evaluation.correspondence.matched_pair` takes after the backbone: (picture, augmentation, seed, index).
"""

from __future__ import annotations

import numpy as np
import paddle

from ppdensecl.data.views import draw_views, grid_correspondence
from ppdensecl.errors import UserError
from ppdensecl.evaluation.correspondence import matched_pair
from ppdensecl.models.densecl import normalise, normalised_rows
from ppdensecl.visual.figure import frame, save, sheet
from ppdensecl.visual.views import draw_lines, draw_matches

_WIDTH = 448  # pixels that a view is drawn with, about


@paddle.no_grad()
def cosines(backbone, views):
    """The similarity of each query cell to each key cell: views uint8 [2, h, w, 3] → float32 [S_h · S_w, S_h · S_w]."""
    query, key = normalised_rows(backbone(normalise(paddle.to_tensor(views)))).numpy()
    return query @ key.T


def mutual(cosine, matches, threshold):
    """Which query cells are also the nearest of the key cell that is nearest to them, with a similarity above the threshold.

    cosine as from `cosines`, matches int64 [S_h, S_w] as from `matched_pair`. Returns bool [S_h, S_w].
    """
    there = matches.flatten()
    cells = np.arange(len(there))
    return ((cosine.argmax(0)[there] == cells) & (cosine[cells, there] > threshold)).reshape(matches.shape)


def draw_pair(backbones, view, path):
    """Writes the matches of the more similar half of the cells that both views show as a PNG."""
    drawn = {}
    for name, backbone in backbones.items():
        views, matches, error, similarity = matched_pair(backbone, *view)
        visible = ~np.isnan(error)
        drawn[f"{name}: {(error[visible] <= 1).sum()} of the {visible.sum()} cells that both views show are matched to within "
              "one cell of the truth"] = draw_matches(views, matches, error, similarity, _scale(views))
    _below_each_other(drawn, "Each query cell and its most similar key cell (the more similar half of those that both views "
                      "show)\ngreen: within one cell of the truth, red: not", path)


def draw_mutual(backbones, view, threshold, path):
    """Writes all mutual nearest neighbours with a similarity above the threshold as a PNG."""
    drawn = {}
    for name, backbone in backbones.items():
        views, matches, error, _ = matched_pair(backbone, *view)
        chosen = mutual(cosines(backbone, views), matches, threshold)
        right, unseen = (chosen & (error <= 1)).sum(), (chosen & np.isnan(error)).sum()
        drawn[f"{name}: {chosen.sum()} of {chosen.size} cells pass: {right} right, {chosen.sum() - right - unseen} wrong, "
              f"{unseen} of unseen places"] = draw_lines(views, matches, error, chosen, _scale(views))
    _below_each_other(drawn, f"Cells of two views that are each other's most similar, with a cosine above {threshold:g}\ngreen: "
                      "within one cell of the truth, red: not, orange: the key view does not show the place", path)


def _scale(views):
    return max(1, _WIDTH // views.shape[2])


def _below_each_other(drawn, title, path):
    """Writes {title: picture} as rows."""
    height, width = next(iter(drawn.values())).shape[:2]
    figure, axes = sheet(len(drawn), 1, 8.6, 0.6 + len(drawn) * (0.3 + 8.4 * height / width))
    for axis, (text, picture) in zip(axes.flat, drawn.items()):
        axis.imshow(picture)
        axis.set_title(text, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def draw_similarity(backbones, view, cell, path):
    """Writes the similarity of one query cell to all of the key view as a PNG.

    cell: (row, column), from 0; None for the one with the greatest contrast in pixels of those that both views show, if possible
    one that is not at the border. Raises UserError where a view has no such cell, or there is none that both views show.
    """
    picture, augmentation, *numbers = view
    seen = {name: matched_pair(backbone, *view) for name, backbone in backbones.items()}
    views, matches, error, _ = next(iter(seen.values()))
    rows, columns = grid = matches.shape
    if cell is None and np.isnan(error).all():
        raise UserError(f"the two views of picture {numbers[1]} show no cell in common; say which cell to draw")
    if cell is None:
        contrast = np.array([[part.std() for part in np.array_split(line, columns, 1)]
                             for line in np.array_split(views[0].mean(2), rows)])
        inner = np.pad(np.ones((rows - 2, columns - 2)), 1) if min(grid) > 2 else np.ones(grid)  # the others see the padding
        cell = np.unravel_index((contrast + 1000 * inner + 2000 * ~np.isnan(error)).argmax(), grid)
    elif not (0 <= cell[0] < rows and 0 <= cell[1] < columns):
        raise UserError(f"--cell {cell[0]} {cell[1]}: a view has {rows} rows and {columns} columns of cells, counted from 0")
    cell = tuple(map(int, cell))
    params = draw_views(augmentation, *picture.shape[:2], numbers[0], 0, numbers[1])
    truth = None if np.isnan(error[cell]) else grid_correspondence(*params, grid)[0][cell]

    figure, axes = sheet(1, 2 + len(backbones), 3.3 * (2 + len(backbones)), 1.1 + 2.75 * views.shape[1] / views.shape[2])
    query, key, *maps = axes[0]
    size = np.array(views.shape[1:3]) / grid
    query.imshow(views[0])
    query.set_title(f"query view: row {cell[0]}, column {cell[1]}", fontsize=10)
    frame(query, cell[1] * size[1], cell[0] * size[0], size[1], size[0], "red")
    key.imshow(views[1])
    key.set_title("key view" + ("" if truth is not None else " (does not show that place)"), fontsize=10)
    marked = [key, *maps]
    for axis, (name, backbone) in zip(maps, backbones.items()):
        near = cosines(backbone, views)[cell[0] * columns + cell[1]].reshape(grid)
        axis.imshow(views[1].mean(2), cmap="gray", vmin=-100, vmax=355)
        shown = axis.imshow(near, alpha=0.65, extent=(-0.5, views.shape[2] - 0.5, views.shape[1] - 0.5, -0.5))
        figure.colorbar(shown, ax=axis, label="cosine", shrink=0.8)
        found = divmod(int(seen[name][1][cell]), columns)
        frame(axis, found[1] * size[1], found[0] * size[0], size[1], size[0], "red")
        off = seen[name][2][cell]
        axis.set_title(f"{name}: row {found[0]}, column {found[1]}"
                       + ("" if truth is None else f",\n{off:.1f} cells from the truth"), fontsize=10)
    for axis in marked if truth is not None else ():
        row, column = (truth + 0.5) * size - 0.5
        for colour, width in (("black", 4), ("white", 2)):
            axis.plot(column, row, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
    figure.suptitle("One cell of the query view, and how similar the cells of the key view are to it\n"
                    "frames: the cell and its most similar one, circle: the true place", fontsize=11)
    save(figure, path)
