"""Does dense matching find the right place? The crops and flips of two views are known, and so is the truth."""

import numpy as np
import paddle

from ppdensecl import parallel
from ppdensecl.data.sources import spread
from ppdensecl.data.transforms import Augmentation
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
    return views, index.reshape(grid), _errors(index, grid_correspondence(*params, grid)), similarity.reshape(grid)


def _errors(index, truth):
    """Distance in cells of the flat key cells `index` from the truth, NaN where there is none; as `grid_correspondence`'s grid."""
    position, inside = truth
    found = np.stack(np.unravel_index(index.ravel(), inside.shape), -1).reshape(position.shape)
    return np.where(inside, np.abs(found - position).max(-1), np.nan)


def larger_views(size):
    """The augmentation to views of twice the training `size` (height, width): the map of a small view has too few cells for a
    match to be wrong by more than one."""
    return Augmentation(size=tuple(2 * side for side in size))


def matched_share(backbone, source, augmentation, seed, count, shuffle=False):
    """(share of query cells, of those that the key view shows, whose match lies within one cell of the truth; the share
    that a random match would have), over `count` pictures of the source spread evenly, which all ranks share.

    With `shuffle`, the control, the key's cells change places after the matching: the first must be the second then.
    """
    right = near = visible = 0.0
    for index, picture in spread(source, count, parallel.rank(), parallel.world_size()):
        _, matches, _, _ = matched_pair(backbone, picture, augmentation, seed, index)
        cells = np.arange(matches.size)
        if shuffle:
            matches = np.random.default_rng([seed, 7, index]).permutation(cells)[matches]
        truth = grid_correspondence(*draw_views(augmentation, *picture.shape[:2], seed, 0, index), matches.shape)
        right += (_errors(matches, truth) <= 1).sum()
        near += np.mean([_errors(np.full(matches.size, cell), truth) <= 1 for cell in cells], axis=0).sum()
        visible += truth[1].sum()
    right, near, visible = parallel.mean([float(right), float(near), float(visible)])
    return right / max(visible, 1e-12), near / max(visible, 1e-12)
