"""The contact sheet of a search by example."""

from __future__ import annotations

import numpy as np

from ppdensecl.visual.figure import frame, save, sheet


def draw_found(query, cell, whole, places, pictures, grid, path):
    """Writes a PNG: the query beside the most similar pictures, and its cell beside the most similar places.

    query uint8 [H, W, 3]; cell (row, column) of the grid (rows, columns); whole [(index, cosine)]; places
    [(index, (row, column), cosine)]; pictures: a source. Raises UserError.
    """
    columns = 1 + max(len(whole), len(places))
    figure, axes = sheet(2, columns, 2.2 * columns, 4.6 * query.shape[0] / query.shape[1] + 1)
    rows = ([("query", query, None), *((f"{cosine:.2f}", pictures.picture(i), None) for i, cosine in whole)],
            [("its place", query, cell), *((f"{cosine:.2f}", pictures.picture(i), found) for i, found, cosine in places)])
    for line, row, title in zip(axes, rows, ("similar pictures\n(pooled feature)", "similar places\n(feature map)")):
        for axis, (text, picture, found) in zip(line, row):
            axis.imshow(picture)
            axis.set_title(text, fontsize=9)
            if found is not None:
                height, width = np.array(picture.shape[:2]) / grid
                frame(axis, found[1] * width, found[0] * height, width, height, "yellow")
        line[0].text(-0.08, 0.5, title, transform=line[0].transAxes, rotation=90, va="center", ha="center", fontsize=9)
    save(figure, path, f"--out {path}")
