"""Does dense matching find the right place? The crops and flips of two views are known, and so is the truth."""

import numpy as np
import paddle

from ppdensecl.data.sources import spread
from ppdensecl.data.views import draw_views, grid_correspondence
from ppdensecl.models.densecl import normalise, normalised_rows
from ppdensecl.models.matching import match


@paddle.no_grad()
def matched_pair(backbone, picture, augmentation, seed, index):
    """One picture's two views and their correspondence.

    Returns views uint8 [2, h, w, 3]; matches int64 [S_h, S_w], the flat key cell matched to each query cell; error float64
    [S_h, S_w], the distance of that cell from the true place in cells (the greater of rows and columns), NaN where the key
    view does not show it; similarity float32 [S_h, S_w] of the match.
    """
    params = draw_views(augmentation, *picture.shape[:2], seed, 0, index)
    views = np.stack([augmentation.apply(picture, p) for p in params])
    maps = backbone(normalise(paddle.to_tensor(views)))  # [2, C, S_h, S_w]
    grid = tuple(maps.shape[2:])
    rows = normalised_rows(maps)
    index = match(rows[:1], rows[1:]).numpy()[0]
    similarity = (rows[0].numpy() * rows[1].numpy()[index]).sum(1)
    position, inside = grid_correspondence(*params, grid)
    found = np.stack(np.unravel_index(index, grid), -1).reshape(*grid, 2)
    error = np.where(inside, np.abs(found - position).max(-1), np.nan)
    return views, index.reshape(grid), error, similarity.reshape(grid)


def matched_share(backbone, source, augmentation, seed, count):
    """(share of query cells, of those that the key view shows, whose match lies within one cell of the truth; the share
    that a random match would have), over `count` pictures of the source spread evenly."""
    right, chance = [], []
    for index, picture in spread(source, count):
        _, matches, error, _ = matched_pair(backbone, picture, augmentation, seed, index)
        visible = ~np.isnan(error)
        right += list(error[visible] <= 1)
        position, _ = grid_correspondence(*draw_views(augmentation, *picture.shape[:2], seed, 0, index), matches.shape)
        cells = np.stack(np.meshgrid(*map(np.arange, matches.shape), indexing="ij"), -1).reshape(-1, 2)
        near = np.abs(cells[None, None] - position[:, :, None]).max(-1) <= 1
        chance += list(near.mean(-1)[visible])
    return float(np.mean(right)), float(np.mean(chance))
