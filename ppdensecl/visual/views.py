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


RIGHT, WRONG, UNSEEN = (40, 200, 60), (230, 50, 40), (240, 150, 20)  # colours of a match


def draw_matches(views, matches, error, similarity, scale=2, share=0.5):
    """Lines between the cells of two views: green within one cell of the truth, red otherwise.

    Arguments as from `evaluation.correspondence.matched_pair`. Of the cells that the key view shows, the `share` with the
    greatest similarity are drawn. Returns uint8 [H, W, 3] RGB.
    """
    chosen = ~np.isnan(error)
    if chosen.any():
        chosen = chosen & (similarity >= np.quantile(similarity[chosen], 1 - share))
    return draw_lines(views, matches, error, chosen, scale)


def draw_lines(views, matches, error, chosen, scale=2):
    """The matches of the `chosen` query cells (bool [S_h, S_w]) as lines between two views; other arguments as `draw_matches`.

    Green is within one cell of the truth, red is not, orange starts at a place that the key view does not show.
    """
    _, h, w, _ = views.shape
    gap = 16
    canvas = np.full((h * scale, 2 * w * scale + gap, 3), 255, np.uint8)
    for view, left in zip(views, (0, w * scale + gap)):
        canvas[:, left:left + w * scale] = cv2.resize(view, (w * scale, h * scale), interpolation=cv2.INTER_CUBIC)
    grid = matches.shape
    for row, column in zip(*np.nonzero(chosen)):
        # Lines of one row to itself would lie on each other: within its cells each column's ends are a little lower.
        lower = 0.6 * ((column + 0.5) / grid[1] - 0.5)
        found = divmod(int(matches[row, column]), grid[1])
        start = _place((row, column), lower, grid, h * scale, w * scale, 0)
        end = _place(found, lower, grid, h * scale, w * scale, w * scale + gap)
        colour = UNSEEN if np.isnan(error[row, column]) else RIGHT if error[row, column] <= 1 else WRONG
        cv2.line(canvas, start, end, colour, 1, cv2.LINE_AA)
        for point in (start, end):
            cv2.circle(canvas, point, 4, colour, -1, cv2.LINE_AA)
    return canvas


def _place(cell, lower, grid, height, width, left):
    return left + int((cell[1] + 0.5) / grid[1] * width), int((cell[0] + 0.5 + lower) / grid[0] * height)
