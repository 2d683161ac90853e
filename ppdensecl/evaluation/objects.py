"""Labelled pictures from the synthetic scenes: each object cut out by its box."""

import numpy as np


def crops(source, scenes, margin=0.1):
    """The objects of the given scenes: ([uint8 [h, w, 3], …], int64 [n] classes from 0)."""
    pictures, labels = [], []
    for index in scenes:
        scene = source.scene(int(index))
        height, width = scene.mask.shape
        for (x1, y1, x2, y2), label in zip(scene.boxes, scene.classes):
            dx, dy = margin * (x2 - x1), margin * (y2 - y1)
            top, bottom = int(max(0, y1 - dy)), int(min(height, np.ceil(y2 + dy)))
            left, right = int(max(0, x1 - dx)), int(min(width, np.ceil(x2 + dx)))
            pictures.append(scene.picture[top:bottom, left:right])
            labels.append(label - 1)
    return pictures, np.array(labels)
