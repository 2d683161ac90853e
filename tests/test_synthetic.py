"""The synthetic scenes: reproducible, consistent with their truth, varied, and not to be classified by colour."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from ppdensecl.data.picture import decode
from ppdensecl.data.synthetic import _SHAPES, CLASSES, LEAST_VISIBLE, SyntheticSource, _object
from ppdensecl.rng import Purpose, generator

SOURCE = SyntheticSource(1000, seed=3)
SCENES = [SOURCE.scene(i) for i in range(150)]


def test_shapes_and_types():
    for scene in SCENES[:10] + [SyntheticSource(2, size=(200, 90)).scene(1)]:
        height, width = scene.mask.shape
        n = len(scene.classes)
        assert scene.picture.shape == (height, width, 3) and scene.picture.dtype == np.uint8
        assert scene.mask.dtype == np.uint8
        assert scene.instances.shape == (height, width) and scene.instances.dtype == np.int32
        assert scene.boxes.shape == (n, 4) and scene.boxes.dtype == np.float32
        assert scene.classes.shape == (n,) and scene.classes.dtype == np.int64
    assert SCENES[0].mask.shape == (128, 160) and scene.mask.shape == (200, 90)


def test_the_truth_is_consistent():
    for scene in SCENES:
        n = len(scene.classes)
        assert set(np.unique(scene.instances)) == set(range(n + 1))
        assert (scene.classes >= 1).all() and (scene.classes <= len(CLASSES)).all()
        assert (scene.mask == np.array([0, *scene.classes])[scene.instances]).all()
        for k, box in enumerate(scene.boxes):
            rows, columns = np.nonzero(scene.instances == k + 1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_first_object_hides_all_others():
    for i, scene in enumerate(SCENES[:50]):
        rng = generator(3, Purpose.SYNTHETIC, i)
        rng.integers(2, 6)  # how many objects
        label = int(rng.integers(len(CLASSES)))
        alpha, paint, top, left = _object(rng, label, 128, 160)
        rows, columns = np.nonzero(alpha == 1)
        inside = (rows + top >= 0) & (rows + top < 128) & (columns + left >= 0) & (columns + left < 160)
        rows, columns = rows[inside], columns[inside]
        grain = scene.picture[rows + top, columns + left] - np.clip(240 * paint[rows, columns], 0, 255)
        assert (np.abs(grain - 7) <= 8).mean() > 0.95  # what clips has less grain
        assert (scene.mask[rows + top, columns + left] == label + 1).all()


def test_scenes_are_varied():
    assert {len(scene.classes) for scene in SCENES} == {2, 3, 4, 5}
    classes = np.concatenate([scene.classes for scene in SCENES])
    assert np.bincount(classes, minlength=9)[1:].min() > len(classes) / 8 / 2
    covered = np.mean([scene.mask > 0 for scene in SCENES])
    assert 0.1 < covered < 0.3


def test_objects_show_at_least_their_least_part(monkeypatch):
    whole = []

    def recorded(*arguments):
        patch = _object(*arguments)
        whole.append((arguments[1] + 1, np.count_nonzero(patch[0] >= 0.5)))
        return patch

    monkeypatch.setattr("ppdensecl.data.synthetic._object", recorded)
    dropped = 0
    for i in range(60):
        whole.clear()
        scene = SOURCE.scene(i)
        tries = iter(whole)
        for k, label in enumerate(scene.classes):
            shown = np.count_nonzero(scene.instances == k + 1)
            # The tries that were dropped stand between those that were kept, in order.
            assert any(tried == label and LEAST_VISIBLE * area <= shown <= area for tried, area in tries)
        dropped += len(whole) - len(scene.classes)
    assert 0 < dropped < 60


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_objects(label):
    assert len(_SHAPES) == len(CLASSES)
    for i in range(30):
        alpha, paint, top, left = _object(generator(0, Purpose.SYNTHETIC, i), label, 128, 160)
        assert alpha.min() == 0 and alpha.max() == 1
        assert not alpha[[0, -1]].any() and not alpha[:, [0, -1]].any()  # the patch holds the whole object
        rows, columns = np.nonzero(alpha >= 0.5)
        diameter = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.2 * 128 * 0.6 < diameter < 0.5 * 128 * 1.2 + 2
        edge = ((alpha > 0.05) & (alpha < 0.95)).sum()
        assert edge > 0.5 * diameter  # anti-aliased
        assert -10 < top + np.mean(rows) < 138 and -10 < left + np.mean(columns) < 170


def test_a_scene_is_a_function_of_seed_and_index():
    again = SyntheticSource(1000, seed=3)
    for i in (7, 0, 7):
        for field in ("picture", "mask", "instances", "boxes", "classes"):
            assert (getattr(again.scene(i), field) == getattr(SCENES[i], field)).all()
    assert (SyntheticSource(8, seed=3).scene(7).picture == SCENES[7].picture).all()  # whatever the count
    assert (SyntheticSource(1000, seed=4).scene(7).picture != SCENES[7].picture).mean() > 0.5
    assert len({scene.picture.tobytes() for scene in SCENES}) == len(SCENES)


def test_another_process_makes_the_same():
    code = (
        "import hashlib\nfrom ppdensecl.data.synthetic import SyntheticSource\n"
        "s = SyntheticSource(9, seed=3)\n"
        "print(hashlib.sha256(b''.join(s.picture(i).tobytes() + s.scene(i).mask.tobytes() for i in (8, 2))).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in "12"
    ]
    here = hashlib.sha256(b"".join(SCENES[i].picture.tobytes() + SCENES[i].mask.tobytes() for i in (8, 2))).hexdigest()
    assert [run.stdout.decode().strip() for run in runs] == [here, here], runs[0].stderr


def test_colour_does_not_tell_the_class():
    """15 nearest neighbours by mean and spread of the colour: hardly better than one in eight."""
    features, labels = [], []
    for scene in SCENES + [SOURCE.scene(i) for i in range(150, 300)]:
        for k, label in enumerate(scene.classes):
            pixels = scene.picture[scene.instances == k + 1]
            features.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)]))
            labels.append(label)
    features, labels = np.array(features), np.array(labels)
    features /= features.std(axis=0)
    distances = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = labels[np.argsort(distances, axis=1)[:, :15]]
    guesses = np.array([np.bincount(row).argmax() for row in nearest])
    assert (guesses == labels).mean() < 0.25


def test_as_a_source():
    assert len(SOURCE) == 1000 and "12" in SOURCE.name(12)
    assert (decode(SOURCE.read(5), "png") == SOURCE.picture(5)).all()
    prints = {SyntheticSource(*arguments).fingerprint() for arguments in ((9, 0), (8, 0), (9, 1), (9, 0, (64, 64)))}
    assert len(prints) == 4 and SyntheticSource(9).fingerprint() in prints
    for outside in (-1, 1000):
        with pytest.raises(IndexError):
            SOURCE.scene(outside)
    for wrong in (dict(count=0), dict(count=1, size=(16, 160))):
        with pytest.raises(ValueError):
            SyntheticSource(**wrong)
