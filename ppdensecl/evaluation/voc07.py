"""Average precision as PASCAL VOC 2007 counts it, at COCO's thresholds of IoU: as detectron2 has it, and so the paper's AP.

COCO's own evaluation differs in three ways. It takes the precision at 101 points of recall, VOC 2007 at 11. It gives a box the
best object that is still free, VOC the best object, and a second box for that one is wrong. It tells of 100 boxes a picture.
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = np.arange(0.5, 1, 0.05)


def average_precision(objects, boxes):
    """{threshold in percent: mean AP over the classes} for the ten `THRESHOLDS`.

    objects: COCO's "annotations", [{"image_id", "category_id", "bbox": [x, y, w, h], "iscrowd"}], difficult ones with iscrowd 1:
        a box for such an object counts neither way.
    boxes: COCO's results, [{"image_id", "category_id", "bbox", "score"}].
    """
    by_class = {}
    for kind, items in enumerate((objects, boxes)):
        for item in items:
            by_class.setdefault(item["category_id"], ([], []))[kind].append(item)
    each = [_of_class(*items) for items in by_class.values() if any(not item["iscrowd"] for item in items[0])]
    return {round(100 * threshold): float(mean) for threshold, mean in zip(THRESHOLDS, np.mean(each, axis=0))}


def _of_class(objects, boxes):
    """AP at each of the thresholds, float64 [10]."""
    there = {}
    for item in objects:
        there.setdefault(item["image_id"], []).append(item)
    places = {image: (np.array([item["bbox"] for item in items], np.float64), number)
              for number, (image, items) in enumerate(there.items())}
    first = np.cumsum([0, *(len(items) for items in there.values())])
    difficult = np.array([bool(item["iscrowd"]) for items in there.values() for item in items])
    boxes = sorted(boxes, key=lambda box: -box["score"])
    overlap, nearest = np.zeros(len(boxes)), np.zeros(len(boxes), int)  # of each box, the best object of its picture
    for number, box in enumerate(boxes):
        if box["image_id"] in places:
            truth, image = places[box["image_id"]]
            found = _iou(np.array(box["bbox"], np.float64), truth)
            overlap[number], nearest[number] = found.max(), first[image] + found.argmax()
    return np.array([_eleven_points(overlap > threshold, nearest, difficult) for threshold in THRESHOLDS])


def _eleven_points(hits, nearest, difficult):
    """AP of boxes in the order of their scores: whether each meets its object, and which that is."""
    counts = ~(hits & difficult[nearest]) if len(hits) else hits
    right = np.zeros(len(hits), bool)
    taken = np.flatnonzero(hits & counts)
    right[taken[np.unique(nearest[taken], return_index=True)[1]]] = True  # the first box of each object
    right = right[counts].cumsum()
    recall, precision = right / (~difficult).sum(), right / np.arange(1, len(right) + 1)
    points = np.arange(0, 1.1, 0.1)  # 0.30000000000000004 is among them, and a recall of 3/10 does not reach it: as everywhere
    return np.mean([precision[recall >= point].max(initial=0) for point in points])


def _iou(box, others):
    """[4], [n, 4] as x, y, width, height → [n]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    return common / np.maximum(box[2:].prod() + others[:, 2:].prod(axis=1) - common, 1e-12)
