"""The two views of a picture: reproducible, the same of a reduced picture, and where one shows what the other shows."""

import os

import cv2
import numpy as np
import pytest

from ppdensecl.data.picture import decode
from ppdensecl.data.transforms import Augmentation, ViewParams
from ppdensecl.data.views import draw_views, grid_correspondence, needed, two_views
from test_transforms import PICTURES, difference, photos, report


def test_two_views_are_a_pure_function():
    picture, augmentation = PICTURES[0], Augmentation(size=(40, 56))
    views = two_views(picture, augmentation, seed=7, epoch=3, index=11)
    assert views.shape == (2, 40, 56, 3) and views.dtype == np.uint8
    two_views(PICTURES[1], augmentation, 7, 3, 12)  # what happened in between does not matter
    np.testing.assert_array_equal(two_views(picture, augmentation, 7, 3, 11), views)
    elsewhere = ((8, 3, 11), (7, 4, 11), (7, 3, 12), (7, 11, 3), (0, 0, 0))
    others = [two_views(picture, augmentation, *at) for at in elsewhere]
    every = [view.tobytes() for pair in (views, *others) for view in pair]
    assert len(set(every)) == len(every)  # also query ≠ key
    for view, params in zip(views, draw_views(augmentation, 150, 210, 7, 3, 11)):
        np.testing.assert_array_equal(view, augmentation.apply(picture, params))


def test_two_views_write_into_a_batch():
    augmentation = Augmentation(size=(32, 32))
    batch = np.zeros((2, 4, 32, 32, 3), np.uint8)  # all queries, then all keys: a sample is not contiguous
    returned = two_views(PICTURES[0], augmentation, 0, 0, 5, out=batch[:, 2])
    assert np.shares_memory(returned, batch)
    np.testing.assert_array_equal(batch[:, 2], two_views(PICTURES[0], augmentation, 0, 0, 5))
    assert not batch[:, [0, 1, 3]].any()
    with pytest.raises(ValueError):
        two_views(PICTURES[0], augmentation, 0, 0, 5, out=np.zeros((2, 32, 31, 3), np.uint8))


def jpeg(picture):
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def views_of(data, augmentation, index, reduced=True):
    """Both views, and by how much the picture was reduced."""
    size = []

    def fewest(*full):
        size[:] = full
        return needed(augmentation, *full, 0, 0, index) if reduced else full

    picture = decode(data, "large", fewest)
    return two_views(picture, augmentation, 0, 0, index, full=tuple(size)).astype(float), round(size[0] / len(picture))


def test_views_of_a_reduced_picture_are_those_of_the_whole():
    """Within what the finest detail makes of two filters: libjpeg's reduction, which is none of Pillow's."""
    for source in ("made", "photos" if os.environ.get("PPDENSECL_TEST_DATA") else "made"):
        small = PICTURES[:2] if source == "made" else photos()
        large = [cv2.resize(picture, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for picture in small]
        rows, by = [], set()
        for index in range(12):
            data = jpeg(large[index % len(large)])
            ours, factor = views_of(data, Augmentation(size=(96, 96)), index)
            rows.append(difference(ours, views_of(data, Augmentation(size=(96, 96)), index, reduced=False)[0]))
            by.add(factor)
        _, mean, bias = report(f"views of reduced pictures, {source}", rows)
        assert mean < 1 and abs(bias) < 0.1 and {2, 4} & by and max(by) > 1


def test_the_crop_of_a_reduced_picture_lies_where_it_lies_in_the_whole():
    """On a ramp a place is a colour: half a pixel of a view is a level or so."""
    ramp = np.tile(np.linspace(0, 255, 1500), (1500, 1))
    picture = np.stack([ramp.T, ramp, 0 * ramp], axis=2).astype(np.uint8)
    augmentation = Augmentation(size=(100, 100), jitter_p=0, gray_p=0, blur_p=0)
    for index in range(10):
        (ours, factor), (whole, _) = (views_of(jpeg(picture), augmentation, index, reduced) for reduced in (True, False))
        shift = (ours - whole).mean(axis=(1, 2))[:, :2]  # of each view, down and to the right
        # An eighth is made of the blocks' rounded means alone, and up to 0.1 brighter. 188 of 1500 taken for an eighth: 0.4.
        assert factor >= 4 and np.abs(shift).max() < 0.2, shift


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (1, 1)])
def test_grid_correspondence_by_painting(grid):
    """A picture whose colours are its coordinates: what the two views show at corresponding places must be the same."""
    height, width = 200, 250
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([y, x, np.zeros_like(x)], axis=-1).astype(np.uint8)
    augmentation = Augmentation(size=(112, 140), jitter_p=0, gray_p=0, blur_p=0)

    def shown(view, cells):  # the colours [S_h, S_w, 2] at places in units of cells
        at = ((cells + 0.5) / grid * view.shape[:2] - 0.5).astype(np.float32)
        colours = cv2.remap(view, at[..., 1], at[..., 0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return colours[..., :2].astype(float)

    own = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    flips, seen = set(), 0
    for index in range(60):
        q, k = draw_views(augmentation, height, width, 0, 0, index)
        query, key = two_views(picture, augmentation, 0, 0, index)
        position, inside = grid_correspondence(q, k, grid)
        assert position.shape == (*grid, 2) and inside.shape == grid
        at = shown(query, own)  # the point of the picture that a query cell's centre shows
        assert np.abs(shown(key, position) - at)[inside].max(initial=0) < 2
        lower, upper = np.array([k.top, k.left]), np.array([k.top + k.height, k.left + k.width]) - 1
        assert ((lower - 2 < at) & (at < upper + 2)).all(axis=-1)[inside].all()
        assert not ((lower + 2 < at) & (at < upper - 2)).all(axis=-1)[~inside].any()
        flips.add((q.flip, k.flip))
        seen += inside.sum()
    assert len(flips) == 4 and 0.2 < seen / (60 * np.prod(grid)) < 1


def test_grid_correspondence_with_itself_and_its_mirror():
    p = ViewParams(10, 20, 100, 60)
    mirror = ViewParams(10, 20, 100, 60, flip=True)
    rows, columns = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
    for query, key in ((p, p), (mirror, mirror), (p, mirror), (mirror, p)):
        position, inside = grid_correspondence(query, key, (4, 6))
        expected = np.stack([rows, columns if query is key else 5 - columns], axis=-1)
        np.testing.assert_allclose(position, expected, atol=1e-12)
        assert inside.all()
    assert not grid_correspondence(p, ViewParams(110, 20, 50, 60), (4, 6))[1].any()
