"""AP of VOC 2007: by hand, and against the rules written out box by box."""

import numpy as np
import pytest

from ppdensecl.evaluation.voc07 import THRESHOLDS, average_precision


def _object(image, box, category=1, difficult=0):
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": difficult}


def _box(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_by_hand():
    objects = [_object(1, [0, 0, 10, 10]), _object(1, [20, 0, 10, 10]), _object(2, [0, 0, 10, 10]),
               _object(2, [40, 40, 9, 9], difficult=1)]
    boxes = [_box(1, [0, 0, 10, 10], 0.9),  # right
             _box(1, [1, 0, 10, 10], 0.8),  # the same object again: wrong
             _box(2, [40, 40, 9, 9], 0.7),  # a difficult one: does not count
             _box(2, [0, 0, 10, 6], 0.6),  # right up to an IoU of 0.6
             _box(3, [0, 0, 10, 10], 0.5)]  # nothing there
    found = average_precision(objects, boxes)
    # recall 1/3 with precision 1 (points 0 to 0.3), 2/3 with precision 2/3 (points 0.4 to 0.6)
    assert found[50] == pytest.approx((4 + 3 * 2 / 3) / 11) and found[75] == pytest.approx(4 / 11) and len(found) == 10
    assert average_precision(objects + [_object(1, [0, 0, 5, 5], category=2)], boxes)[50] == pytest.approx(found[50] / 2)
    assert average_precision(objects, []) == dict.fromkeys(found, 0)


def _iou(a, b):
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def _plainly(objects, boxes, threshold):
    means = []
    for category in {item["category_id"] for item in objects}:
        truth = [item for item in objects if item["category_id"] == category]
        used, outcomes = set(), []
        for box in sorted((box for box in boxes if box["category_id"] == category), key=lambda box: -box["score"]):
            near = [(i, _iou(box["bbox"], item["bbox"])) for i, item in enumerate(truth) if item["image_id"] == box["image_id"]]
            best, overlap = max(near, key=lambda pair: pair[1], default=(None, 0))
            if overlap > threshold and truth[best]["iscrowd"]:
                continue
            outcomes.append(overlap > threshold and best not in used)
            if overlap > threshold:
                used.add(best)
        total, right, curve = sum(not item["iscrowd"] for item in truth), 0, []
        for number, outcome in enumerate(outcomes, 1):
            right += outcome
            curve.append((right / total, right / number))
        means.append(sum(max((p for r, p in curve if r >= point), default=0) for point in np.arange(0, 1.1, 0.1)) / 11)
    return sum(means) / len(means)


def test_as_the_rules_say_box_by_box():
    rng = np.random.default_rng(0)
    objects = [_object(int(rng.integers(12)), [*map(float, rng.uniform(0, 60, 2)), *map(float, rng.uniform(10, 40, 2))],
                       int(rng.integers(3)), int(rng.random() < 0.2)) for _ in range(60)]
    boxes = [_box(item["image_id"], [value + float(rng.normal(0, 3)) for value in item["bbox"]], float(rng.random()),
                  item["category_id"]) for item in objects for _ in range(3)]
    found = average_precision(objects, boxes)
    for threshold in THRESHOLDS:
        assert found[round(100 * threshold)] == pytest.approx(_plainly(objects, boxes, threshold))
    assert found[50] > found[75] > 0
