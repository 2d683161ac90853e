"""Pictures of view pairs: contact sheets, and the dense matches between two views."""

import cv2
import numpy as np


def pair_sheet(views, rows=4, columns=3, gap=12):
    """views uint8 [2, N, h, w, 3] → uint8 [H, W, 3]: the first pairs, each a query view with its key view beside it."""
    _, n, h, w, _ = views.shape
    pairs = min(n, rows * columns)
    columns = min(columns, pairs)
    rows = -(-pairs // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (2 * w + 2 + gap) + gap, 3), 255, np.uint8)
    for i in range(pairs):
        row, column = divmod(i, columns)
        top, left = gap + row * (h + gap), gap + column * (2 * w + 2 + gap)
        sheet[top:top + h, left:left + w] = views[0, i]
        sheet[top:top + h, left + w + 2:left + 2 * w + 2] = views[1, i]
    return sheet


def draw_matches(views, matches, error, similarity, scale=2, share=0.5):
    """Lines between the cells of two views: green within one cell of the truth, red otherwise.

    Arguments as from `evaluation.correspondence.matched_pair`. Of the cells that the key view shows, the `share` with the
    greatest similarity are drawn. Returns uint8 [H, W, 3] RGB.
    """
    _, h, w, _ = views.shape
    gap = 16
    canvas = np.full((h * scale, 2 * w * scale + gap, 3), 255, np.uint8)
    for view, left in zip(views, (0, w * scale + gap)):
        canvas[:, left:left + w * scale] = cv2.resize(view, (w * scale, h * scale), interpolation=cv2.INTER_CUBIC)
    grid = matches.shape
    visible = ~np.isnan(error)
    if not visible.any():
        return canvas
    least = np.quantile(similarity[visible], 1 - share)
    for row, column in zip(*np.nonzero(visible & (similarity >= least))):
        found = divmod(int(matches[row, column]), grid[1])
        start = _centre((row, column), grid, h * scale, w * scale, 0)
        end = _centre(found, grid, h * scale, w * scale, w * scale + gap)
        colour = (40, 200, 60) if error[row, column] <= 1 else (230, 50, 40)
        cv2.line(canvas, start, end, colour, 1, cv2.LINE_AA)
        for point in (start, end):
            cv2.circle(canvas, point, 4, colour, -1, cv2.LINE_AA)
    return canvas


def _centre(cell, grid, height, width, left):
    return left + int((cell[1] + 0.5) / grid[1] * width), int((cell[0] + 0.5) / grid[0] * height)
