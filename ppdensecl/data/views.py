"""The two views of a sample, and which place of one is which place of the other."""

from typing import Optional, Tuple

import numpy as np

from ppdensecl.data.transforms import Augmentation, ViewParams
from ppdensecl.rng import Purpose, generator


def draw_views(
    augmentation: Augmentation, height: int, width: int, seed: int, epoch: int, index: int
) -> Tuple[ViewParams, ViewParams]:
    """The params of the query view and the key view of sample `index` of the data source in `epoch`."""
    query, key = (generator(seed, Purpose.VIEW, epoch, index, view) for view in (0, 1))
    return augmentation.draw(query, height, width), augmentation.draw(key, height, width)


def two_views(
    picture: np.ndarray, augmentation: Augmentation, seed: int, epoch: int, index: int, out: Optional[np.ndarray] = None,
    full: Optional[Tuple[int, int]] = None
) -> np.ndarray:
    """The query view and the key view: uint8 [H, W, 3] → uint8 [2, h, w, 3], a pure function of its arguments.

    With `out` (uint8 [2, h, w, 3], of any layout, e.g. a slot of a batch in shared memory) they are written there. `full` is
    the (height, width) of the picture if these are fewer pixels, see `needed`.
    """
    if out is None:
        out = np.empty((2, *augmentation.size, 3), np.uint8)
    for view, params in zip(out, draw_views(augmentation, *(full or picture.shape[:2]), seed, epoch, index)):
        view[...] = augmentation.apply(picture, params, full)
    return out


def needed(augmentation: Augmentation, height: int, width: int, seed: int, epoch: int, index: int) -> Tuple[int, int]:
    """The rows and columns that `two_views` of a picture of `height` × `width` pixels needs at least."""
    if height < 2 * augmentation.size[0] or width < 2 * augmentation.size[1]:
        return height, width  # not worth a draw: half of it is too little for any crop
    return augmentation.fewest(height, width, draw_views(augmentation, height, width, seed, epoch, index))


def grid_correspondence(query: ViewParams, key: ViewParams, grid: Tuple[int, int]) -> Tuple[np.ndarray, np.ndarray]:
    """Where the key view shows what the cells of the query view show.

    Both views are divided into `grid` = (S_h, S_w) equal cells, whatever their size in pixels. Returns
    position float64 [S_h, S_w, 2]: for the centre of each query cell the (row, column) in the key's grid that shows the
    same point of the picture, in cells, where whole numbers are cell centres;
    inside bool [S_h, S_w]: whether the key view shows the point at all.
    """

    def place(axis, start_q, extent_q, flip_q, start_k, extent_k, flip_k):
        u = (np.arange(grid[axis]) + 0.5) / grid[axis]  # of the query view, 0..1
        u = start_q + extent_q * (1 - u if flip_q else u)  # of the picture, in pixels
        u = (u - start_k) / extent_k  # of the key view
        return 1 - u if flip_k else u

    rows = place(0, query.top, query.height, False, key.top, key.height, False)
    columns = place(1, query.left, query.width, query.flip, key.left, key.width, key.flip)
    place_k = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    return place_k * grid - 0.5, ((0 <= place_k) & (place_k <= 1)).all(axis=-1)
