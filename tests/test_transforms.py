"""The augmentation against Pillow (what is computed) and against an independent reading of torchvision (how it is drawn).
The numbers in the asserts are bounds; `pytest -s` prints what was measured."""

import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from conftest import ROOT
from scipy import stats
from scipy.ndimage import gaussian_filter

from ppdensecl.data import transforms as T
from ppdensecl.data.transforms import Augmentation, ViewParams

sys.path.insert(0, str(ROOT / "tools" / "align"))
from pillow_views import exact_hue, pillow_hue, pillow_view  # noqa: E402

FACTORS = (0.6, 0.83, 1.0, 1.17, 1.4)


def textured(height, width, seed=0):
    """Smooth colour gradients, waves of every orientation up to the finest, hard edges, saturated colours, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.empty((height, width, 3), np.float32)
    for c in range(3):
        a, b, f, g = rng.uniform(-1, 1, 4)
        picture[..., c] = 128 + 90 * np.sin(0.02 * (a * x + b * y) + c) + 40 * np.sin(1.5 * (f * x + g * y))
    squares = ((x // 23 + y // 17) % 7 == 0)[..., None]
    picture = np.where(squares, rng.integers(0, 256, 3), picture) + rng.normal(0, 8, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


NOISE = np.random.default_rng(3).integers(0, 256, (90, 70, 3), np.uint8)
PICTURES = [textured(150, 210, 1), textured(224, 224, 2), NOISE]


def photos():
    folder = os.environ.get("PPDENSECL_TEST_DATA")
    if not folder:
        pytest.skip("PPDENSECL_TEST_DATA does not name a folder with photos/images")
    files = sorted(Path(folder, "photos", "images").glob("*.jpg"))[::300]
    if not files:
        pytest.skip(f"no photos/images/*.jpg in PPDENSECL_TEST_DATA={folder}")
    return [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]


@pytest.fixture(params=["made", "photos"], scope="module")
def pictures(request):
    return PICTURES if request.param == "made" else photos()


def exact_resize(picture, size):
    """Pillow's BILINEAR in float64, rounded nowhere."""
    for axis, target in enumerate(size):
        source = picture.shape[axis]
        centre = (np.arange(target)[:, None] + 0.5) * source / target
        weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centre) / max(source / target, 1))
        weights /= weights.sum(axis=1, keepdims=True)
        picture = np.moveaxis(np.tensordot(weights, picture.astype(np.float64), (1, axis)), 0, axis)
    return picture


def difference(ours, theirs):
    d = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    assert np.shape(ours) == np.shape(theirs)
    return np.array([np.abs(d).max(), np.abs(d).mean(), d.mean()])


def report(name, rows):
    largest, mean, bias = np.max(rows, 0)[0], np.mean(rows, 0)[1], np.mean(rows, 0)[2]
    print(f"\n  {name}: max {largest:.2f}, mean {mean:.4f}, bias {bias:+.4f}", end="")
    return largest, mean, abs(bias)


# --- each transform against Pillow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width,size", [
    (375, 433, (224, 224)), (451, 200, (224, 224)), (200, 451, (224, 224)), (225, 224, (224, 224)),
    (97, 64, (224, 160)), (300, 301, (112, 112)), (240, 320, (96, 65)), (640, 480, (37, 1)), (700, 3, (5, 9)),
    (1, 1, (7, 5)), (1, 90, (16, 16)), (90, 1, (16, 16)), (8, 8, (8, 8)), (9, 9, (8, 8)), (300, 500, (1, 1)),
])  # fmt: skip
def test_resize_is_the_antialiased_one_of_pillow(height, width, size):
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    for picture in (noise, textured(height, width), np.full_like(noise, 255)):
        ours, exact = T.resize(picture, size), exact_resize(picture, size)
        theirs = Image.fromarray(picture).resize(size[::-1], Image.BILINEAR)
        assert difference(ours, theirs)[0] <= 1 and difference(ours, exact)[0] <= 0.502


def test_resize_of_pictures(pictures):
    """Half a level from the exact sum; Pillow, which rounds between the axes too, is up to a whole one from it."""
    pillow, ours_exact, pillow_exact = [], [], []
    for picture in pictures:
        for size in ((224, 224), (112, 112), (50, 80), (300, 400)):
            ours, exact = T.resize(picture, size), exact_resize(picture, size)
            theirs = Image.fromarray(picture).resize(size[::-1], Image.BILINEAR)
            pillow.append(difference(ours, theirs))
            ours_exact.append(difference(ours, exact))
            pillow_exact.append(difference(theirs, exact))
    largest, mean, bias = report("resize, ours − Pillow", pillow)
    assert largest <= 1 and mean < 0.2 and bias < 0.05
    largest, mean, bias = report("resize, ours − exact", ours_exact)
    assert largest <= 0.502 and mean < 0.255 and bias < 0.01
    largest, other_mean, _ = report("resize, Pillow − exact", pillow_exact)
    assert largest <= 1.01 and mean < other_mean


def test_brightness_and_contrast_are_pillows_to_the_bit(pictures):
    for picture in pictures:
        image = Image.fromarray(picture)
        for factor in (0.0, *FACTORS, 2.5):
            brightness, contrast = (x(image).enhance(factor) for x in (ImageEnhance.Brightness, ImageEnhance.Contrast))
            np.testing.assert_array_equal(T.adjust_brightness(picture, factor), brightness)
            np.testing.assert_array_equal(T.adjust_contrast(picture, factor), contrast)


def test_saturation_and_grayscale(pictures):
    saturation, gray = [], []
    for picture in pictures:
        image = Image.fromarray(picture)
        for factor in FACTORS:
            theirs = ImageEnhance.Color(image).enhance(factor)
            saturation.append(difference(T.adjust_saturation(picture, factor), theirs))
        gray.append(difference(T.grayscale(picture), image.convert("L").convert("RGB")))
        np.testing.assert_array_equal(T.adjust_saturation(picture, 1.0), picture)
    largest, mean, _ = report("saturation", saturation)
    assert largest <= 1 and mean < 0.005
    largest, mean, _ = report("grayscale", gray)
    assert largest <= 1 and mean < 0.005


def test_hue_is_exact_and_pillow_is_within_its_own_quantisation(pictures):
    """Pillow cuts the hue off to n/255, and the shift too: up to 2/255 of a turn short, with 6 · 255 levels per turn at
    full chroma 12 levels; and the saturation to n/255: one level, rounding another. So 14 is Pillow's own tolerance."""
    ours_exact, pillow_exact, ours_pillow = [], [], []
    for picture in pictures:
        picture = np.ascontiguousarray(picture[::6, ::6])
        for turns in (-0.1, -0.047, 0.0, 0.013, 0.1):
            ours, exact = T.adjust_hue(picture, turns), exact_hue(picture, turns)
            theirs = pillow_hue(Image.fromarray(picture), turns)
            ours_exact.append(difference(ours, exact))
            pillow_exact.append(difference(theirs, exact))
            ours_pillow.append(difference(ours, theirs))
    largest, _, bias = report("hue, ours − exact", ours_exact)
    assert largest <= 0.51 and bias < 0.02
    assert report("hue, Pillow − exact", pillow_exact)[0] <= 14
    largest, mean, _ = report("hue, ours − Pillow", ours_pillow)
    assert largest <= 14 and mean < 1


def test_blur_is_the_gaussian_and_near_pillows_boxes(pictures):
    """Measured against Pillow away from the border (whose boxes repeat it in each of three passes, we repeat it once)
    and from σ = 0.5 on: below that a sampled Gaussian blurs less than boxes of the same variance."""
    exact, pillow, narrow, border = [], [], [], []
    for picture in pictures:
        for sigma in (0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0):
            ours = T.blur(picture, sigma)
            gaussian = gaussian_filter(picture.astype(float), (sigma, sigma, 0), mode="nearest", truncate=5)
            exact.append(difference(ours, gaussian))
            theirs = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))
            inner = np.s_[8:-8, 8:-8]
            (pillow if sigma >= 0.5 else narrow).append(difference(ours[inner], theirs[inner]))
            border.append(difference(ours, theirs))
    largest, _, bias = report("blur, ours − Gaussian", exact)
    assert largest <= 1 and bias < 0.02
    largest, mean, _ = report("blur, ours − Pillow, inner, σ ≥ 0.5", pillow)
    assert largest <= 16 and mean < 1
    report("blur, ours − Pillow, inner, σ < 0.5", narrow)
    report("blur, ours − Pillow, with border", border)


@pytest.mark.parametrize("sigma", [0.0, 1e-6, 0.1, 0.16])
def test_tiny_blur_is_the_identity(sigma):
    np.testing.assert_array_equal(T.blur(PICTURES[0], sigma), PICTURES[0])


# --- the whole view ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_apply_is_pillows_pipeline(pictures, size):
    augmentation = Augmentation(size=size)
    rng = np.random.default_rng(0)
    geometry, colour, full = [], [], []
    for i in range(24):
        picture = pictures[i % len(pictures)]
        p = augmentation.draw(rng, *picture.shape[:2])
        row = difference(augmentation.apply(picture, p), pillow_view(picture, p, size))
        (full if p.sigma is not None else colour if p.jitter or p.gray else geometry).append(row)
    assert report("view without jitter and blur", geometry)[0] <= 1
    assert report("view without blur", colour)[1] < 1
    _, mean, bias = report("view with blur", full)
    assert mean < 1.5 and bias < 0.5


def test_apply_does_the_parts_in_the_order_of_the_params():
    picture, whole = PICTURES[1], dict(top=0, left=0, height=224, width=224)
    one = (("brightness", 1.4), ("contrast", 0.6))
    for jitter in (one, one[::-1]):
        view = Augmentation().apply(picture, ViewParams(**whole, jitter=jitter))
        np.testing.assert_array_equal(view, pillow_view(picture, ViewParams(**whole, jitter=jitter), (224, 224)))
    flipped = Augmentation().apply(picture, ViewParams(**whole, flip=True))
    np.testing.assert_array_equal(flipped, picture[:, ::-1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (1000, 7)])
def test_small_and_narrow_pictures(shape):
    picture = textured(*shape)
    augmentation, rng = Augmentation(size=(32, 24), jitter_p=1, gray_p=0.5, blur_p=1), np.random.default_rng(0)
    for _ in range(20):
        p = augmentation.draw(rng, *shape)
        assert 0 <= p.top <= p.top + p.height <= shape[0] and 0 <= p.left <= p.left + p.width <= shape[1]
        view = augmentation.apply(picture, p)
        assert view.shape == (32, 24, 3) and view.dtype == np.uint8


def test_memory_layout_does_not_matter():
    picture, augmentation = PICTURES[0], Augmentation(size=(64, 64), jitter_p=1, blur_p=1)
    before = picture.copy()
    same = {
        "reversed channels": picture[..., ::-1].copy()[..., ::-1],
        "columns first": np.asfortranarray(picture),
        "turned": picture[::-1, ::-1].copy()[::-1, ::-1],
        "strided": picture.repeat(2, axis=0).repeat(2, axis=1)[::2, ::2],
        "read-only": np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape),
    }
    for height in (150, 40):  # shrinking and enlarging
        p = augmentation.draw(np.random.default_rng(0), height, height)
        for name, x in same.items():
            np.testing.assert_array_equal(augmentation.apply(x, p), augmentation.apply(picture, p), err_msg=name)
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("shape,dtype", [((5, 5), np.uint8), ((5, 5, 4), np.uint8), ((5, 5, 3), np.float32)])
def test_what_is_no_picture_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        Augmentation().apply(np.zeros(shape, dtype), ViewParams(0, 0, 5, 5))


# --- the distribution of a view ---------------------------------------------------------------------------------------


def draws(augmentation, count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return [augmentation.draw(rng, height, width) for _ in range(count)]


def is_uniform(values, low, high):
    return stats.kstest((np.asarray(values, float) - low) / (high - low), "uniform").pvalue > 0.001


def independent(columns):
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    return np.abs(correlation).max() < 4 / math.sqrt(len(columns[0]))


def test_crop_where_every_attempt_fits():
    """Less than half of a large square: area, log ratio and place are uniform and independent."""
    n = 4000
    params = draws(Augmentation(scale=(0.05, 0.4), ratio=(0.6, 1.5)), n, n, n)
    within = np.random.default_rng(1).random((2, n))
    area = [p.height * p.width / n**2 for p in params]
    ratio = [math.log(p.width / p.height) for p in params]
    top = [(p.top + u) / (n - p.height + 1) for p, u in zip(params, within[0])]
    left = [(p.left + u) / (n - p.width + 1) for p, u in zip(params, within[1])]
    assert is_uniform(area, 0.05, 0.4) and is_uniform(ratio, math.log(0.6), math.log(1.5))
    assert is_uniform(top, 0, 1) and is_uniform(left, 0, 1)
    assert independent([area, ratio, top, left])


def torchvision_crop(rng, height, width, scale, ratio):
    """RandomResizedCrop.get_params as torchvision documents it, one attempt after the other. Also: the fallback?"""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w, False
    h, w = height, width
    if width / height < min(ratio):
        h = int(round(width / min(ratio)))
    elif width / height > max(ratio):
        w = int(round(height * max(ratio)))
    return (height - h) // 2, (width - w) // 2, h, w, True


@pytest.mark.parametrize("height,width", [(375, 500), (500, 333), (6, 8), (100, 300), (400, 90), (20, 1000), (1000, 7)])
def test_crop_is_torchvisions(height, width):
    n, rng = 2500, random.Random(5)
    ours = np.array([(p.top, p.left, p.height, p.width) for p in draws(Augmentation(), n, height, width)])
    theirs = np.array([torchvision_crop(rng, height, width, (0.2, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 0.001
    assert stats.ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 0.001
    fallback = theirs[:, 4].mean()
    if fallback == 1:  # nothing ever fits: the central crop is all there is
        np.testing.assert_array_equal(ours, theirs[:, :4])
    elif fallback > 0.05:  # a part: its one rectangle is as frequent
        central = theirs[theirs[:, 4] == 1][0, :4]
        frequency = (ours == central).all(axis=1).mean()
        assert abs(frequency - (theirs[:, :4] == central).all(axis=1).mean()) < 4 * math.sqrt(0.5 / n)
    assert fallback == 1 if max(height, width) >= 1000 else fallback < 1


def test_the_rest_of_a_view():
    n = 6000
    params = draws(Augmentation(), n, 30, 30)
    happened = np.array([(p.jitter is not None, p.gray, p.sigma is not None, p.flip) for p in params])
    for count, p in zip(happened.sum(axis=0), (0.8, 0.2, 0.5, 0.5)):
        assert stats.binomtest(int(count), n, p).pvalue > 0.001
    assert independent(happened.T)

    assert is_uniform([p.sigma for p in params if p.sigma is not None], 0.1, 2.0)
    jitters = [p.jitter for p in params if p.jitter]
    factors = [[dict(jitter)[part] for jitter in jitters] for part in ("brightness", "contrast", "saturation", "hue")]
    assert all(is_uniform(values, 0.6, 1.4) for values in factors[:3]) and is_uniform(factors[3], -0.1, 0.1)
    assert all(independent([*factors, [jitter[0][0] == part for jitter in jitters]]) for part in ("brightness", "hue"))
    orders = Counter(tuple(part for part, _ in jitter) for jitter in jitters)
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 0.001


@pytest.mark.parametrize("seed,height,width,crop,jitter,sigma,flip", [
    (0, 375, 500, (1, 12, 333, 399), (("saturation", 0.9069420434095067), ("contrast", 1.092308089185003),
     ("hue", 0.09944198715784222), ("brightness", 1.1177516092594)), 1.4708278463687552, False),
    (8, 20, 1000, (0, 486, 20, 27), (("brightness", 0.82769651000865), ("saturation", 0.7452431498901836),
     ("hue", -0.02106628374027944), ("contrast", 0.6134256418595606)), 0.7256498157523322, True),
])  # fmt: skip
def test_a_seed_means_the_same_view_as_ever(seed, height, width, crop, jitter, sigma, flip):
    rng = np.random.default_rng(seed)
    assert Augmentation().draw(rng, height, width) == ViewParams(*crop, jitter, False, sigma, flip)
    assert rng.random() == np.random.default_rng(seed).random(36)[35]


def test_a_probability_changes_nothing_but_what_it_is_the_probability_of():
    with_all = Augmentation(jitter_p=1, gray_p=1, blur_p=1, flip_p=1)
    with_none = Augmentation(jitter_p=0, gray_p=0, blur_p=0, flip_p=0)
    for a, b, c in zip(*(draws(x, 50, 300, 200) for x in (with_all, with_none, Augmentation()))):
        assert (a.top, a.left, a.height, a.width) == (b.top, b.left, b.height, b.width)
        assert a.gray and a.flip and (b.jitter, b.gray, b.sigma, b.flip) == (None, False, None, False)
        assert c.jitter in (None, a.jitter) and c.sigma in (None, a.sigma)
