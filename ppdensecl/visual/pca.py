"""Dense features as colours: the first three principal components of the cells of some feature maps, as red, green and blue."""

from __future__ import annotations

import cv2
import numpy as np

from ppdensecl.visual.figure import save, sheet

_MOST_CELLS = 1000  # that components are fitted to, spread over all


class Colours:
    """Components that maps float32 [n, C, h, w] have in common; cells are unit vectors first, as in the dense loss."""

    def __init__(self, maps):
        # The cells at the border see the padding, and differ from all others by that before anything else.
        cells = _cells(maps[:, :, 1:-1, 1:-1] if min(maps.shape[2:]) > 4 else maps)
        cells = cells[np.unique(np.linspace(0, len(cells) - 1, min(len(cells), _MOST_CELLS)).astype(int))]
        self._mean = cells.mean(axis=0)
        axes = np.linalg.svd(cells - self._mean, full_matrices=False)[2][:3]
        axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # SVD leaves the sign open
        self._axes = np.pad(axes, ((0, 3 - len(axes)), (0, 0)))
        self._low, self._high = np.percentile(self._of(cells), (1, 99), axis=0)

    def _of(self, cells):
        return (cells - self._mean) @ self._axes.T

    def picture(self, feature_map, size):
        """float32 [C, h, w] → uint8 [*size, 3] RGB; size is (height, width) in pixels."""
        height, width = feature_map.shape[1:]
        values = (self._of(_cells(feature_map[None])) - self._low) / np.maximum(self._high - self._low, 1e-12)
        small = (255 * np.clip(values, 0, 1)).astype(np.float32).reshape(height, width, 3)
        return cv2.convertScaleAbs(np.maximum(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC), 0))


def draw_pca(pictures, maps, path):
    """Writes pictures beside the colours of their features as a PNG.

    pictures uint8 [n, H, W, 3]; maps {name of a backbone: float32 [n, C, h, w]}, each with components of its own.
    """
    height, width = pictures.shape[1:3]
    figure, axes = sheet(len(pictures), 1 + len(maps), 2.4 * (1 + len(maps)), 0.8 + 2.4 * len(pictures) * height / width)
    for column, (name, found) in enumerate(maps.items(), 1):
        colours = Colours(found)
        axes[0, column].set_title(f"{name}, {found.shape[2]}×{found.shape[3]} cells", fontsize=10)
        for axis, feature_map in zip(axes[:, column], found):
            axis.imshow(colours.picture(feature_map, (height, width)))
    for axis, picture in zip(axes[:, 0], pictures):
        axis.imshow(picture)
    axes[0, 0].set_title("picture", fontsize=10)
    figure.suptitle("Three principal components of the last stage's cells\n"
                    f"as red, green and blue, pictures of {height}×{width} pixels", fontsize=11)
    save(figure, path)


def _cells(maps):
    """[n, C, h, w] → unit vectors [n · h · w, C]."""
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-12)
