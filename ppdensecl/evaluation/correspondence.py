"""Does dense matching find the right place? The crops and flips of two views are known, and so is the truth."""

import itertools
from typing import NamedTuple

import numpy as np
import paddle

from ppdensecl import parallel
from ppdensecl.data.sources import spread
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import draw_views, grid_correspondence, two_views
from ppdensecl.interop import precise_bn
from ppdensecl.models.densecl import normalise, normalised_rows
from ppdensecl.models.matching import match
from ppdensecl.models.resnet import ResNet


def matched_pair(backbone, picture, augmentation, seed, index):
    """One picture's two views and their correspondence.

    Returns views uint8 [2, h, w, 3]; matches int64 [S_h, S_w], the flat key cell matched to each query cell; error float64
    [S_h, S_w], the distance of that cell from the true place in cells (the greater of rows and columns), NaN where the key
    view does not show it; similarity float32 [S_h, S_w] of the match.
    """
    views, matches, truth, similarity = _match_views(backbone, picture, augmentation, seed, index)
    return views, matches, _errors(matches, truth), similarity


@paddle.no_grad()
def _match_views(backbone, picture, augmentation, seed, index):
    """As `matched_pair`, with what `grid_correspondence` returns in the place of the error."""
    params = draw_views(augmentation, *picture.shape[:2], seed, 0, index)
    views = np.stack([augmentation.apply(picture, p) for p in params])
    maps = backbone(normalise(paddle.to_tensor(views)))  # [2, C, S_h, S_w]
    grid = tuple(maps.shape[2:])
    rows = normalised_rows(maps)
    matches = match(rows[:1], rows[1:]).numpy()[0]
    similarity = (rows[0].numpy() * rows[1].numpy()[matches]).sum(1)
    return views, matches.reshape(grid), grid_correspondence(*params, grid), similarity.reshape(grid)


def _errors(index, truth):
    """Distance in cells of the flat key cells `index` from the truth, NaN where there is none; as `grid_correspondence`'s grid."""
    position, inside = truth
    found = np.stack(np.unravel_index(index.ravel(), inside.shape), -1).reshape(position.shape)
    return np.where(inside, np.abs(found - position).max(-1), np.nan)


def larger_views(size):
    """The augmentation to views of twice the training `size` (height, width): the map of a small view has too few cells for a
    match to be wrong by more than one."""
    return Augmentation(size=tuple(2 * side for side in size))


def normalising(backbone, source, augmentation, seed):
    """The backbone itself; if it has not seen a picture yet, a copy with BatchNorm statistics of these pictures' views.

    With the statistics it is born with (mean 0, variance 1) a BatchNorm passes everything on, zero padding outweighs what a cell
    shows, and nearly every cell is matched to its own position. Training never has that network: it normalises each batch.
    """
    first = getattr(backbone, "bn1", None)
    if first is None or bool((first._mean != 0).any()) or bool((first._variance != 1).any()):
        return backbone
    copy = ResNet(backbone.depth, stages=len(backbone.feat_channels))
    copy.set_state_dict(backbone.state_dict())
    copy.eval()
    pairs = (two_views(picture, augmentation, seed, 0, index) for index, picture in spread(source, 64))
    batches = iter(lambda: list(itertools.islice(pairs, 8)), [])
    precise_bn.estimate(copy, (normalise(paddle.to_tensor(np.concatenate(batch))) for batch in batches))
    return copy


class Matched(NamedTuple):
    """Shares of query cells, of those that the key view shows. A cell's "own position" is the key cell of the same row and
    column: it is often right, for two crops of a picture are alike, and zero padding tells it to a network that knows nothing."""

    right: float  # matched to within one cell of the truth
    chance: float  # `right` of random matches
    own: float  # `right` of matching each cell to its own position
    elsewhere: float  # `right` of the cells alone whose own position is wrong: here padding does not help
    stayed: float  # matched to their own position, be that right or wrong


def matched_share(backbone, source, augmentation, seed, count, shuffle=False):
    """`Matched` of about `count` pictures of the source spread evenly, which all ranks share; see `normalising`.

    With `shuffle`, the control, the key's cells change places after the matching: the first must be the second then.
    """
    backbone, sums = normalising(backbone, source, augmentation, seed), np.zeros(7)
    for index, picture in spread(source, count, parallel.rank(), parallel.world_size()):
        _, matches, truth, _ = _match_views(backbone, picture, augmentation, seed, index)
        cells = np.arange(matches.size)
        if shuffle:
            matches = np.random.default_rng([seed, 7, index]).permutation(cells)[matches]
        right, own = (_errors(found, truth) <= 1 for found in (matches, cells))
        chance = np.mean([_errors(np.full(matches.size, cell), truth) <= 1 for cell in cells], axis=0)
        moved = truth[1] & ~own
        sums += [right.sum(), chance.sum(), own.sum(), truth[1].sum(), (right & moved).sum(), moved.sum(),
                 (truth[1] & (matches.ravel() == cells).reshape(truth[1].shape)).sum()]
    right, chance, own, visible, elsewhere, moved, stayed = parallel.mean(sums.tolist())
    return Matched(*(share / max(visible, 1e-12) for share in (right, chance, own)), elsewhere / max(moved, 1e-12),
                   stayed / max(visible, 1e-12))
