"""The augmentation of one view: uint8 RGB in, uint8 RGB out.

What is computed is what torchvision's transforms compute on Pillow pictures (the pipeline of the paper); how is OpenCV
and numpy, because it runs twice on every sample of every epoch. Drawing and applying are apart: `Augmentation.draw`
fixes everything random about a view in a `ViewParams`, and `Augmentation.apply` is a plain function of picture and
params, so that the geometry of a view stays known. Scaling to 0..1 and normalising happen on the device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Tuple

from PIL import Image

import cv2
import numpy as np


@dataclass(frozen=True)
class ViewParams:
    """All that is random about one view, in the order in which it is applied."""

    top: int  # the crop, in pixels of the picture
    left: int
    height: int
    width: int
    jitter: Optional[Tuple[Tuple[str, float], ...]] = None  # (part, factor) in order of application
    gray: bool = False
    sigma: Optional[float] = None  # of the blur, in pixels of the view
    flip: bool = False


@dataclass(frozen=True)
class Augmentation:
    """The distribution of a view; the defaults are the recipe of DenseCL (and MoCo-v2).

    A strength s means a factor uniform in (max(0, 1 − s), 1 + s); for the hue, a shift uniform in (−s, s) turns.
    """

    size: Tuple[int, int] = (224, 224)  # of the view: height, width
    scale: Tuple[float, float] = (0.2, 1.0)  # area of the crop / area of the picture
    ratio: Tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray_p: float = 0.2
    blur_p: float = 0.5
    sigma: Tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5

    def draw(self, rng: np.random.Generator, height: int, width: int) -> ViewParams:
        """Draw a view of a picture of `height` × `width` pixels.

        Always takes 35 numbers from `rng`, each with one meaning: 10 areas, 10 aspect ratios, top and left of the crop;
        whether to jitter, 4 factors, 4 keys that sort the parts; gray; whether to blur, sigma; flip.
        So a changed probability or strength changes nothing else about the views of a run.
        """
        u = rng.random(35).tolist()
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [_between(max(0, 1 - s), 1 + s, v) for s, v in zip(strengths, u[23:26])]
        factors.append(_between(-self.hue, self.hue, u[26]))
        jitter = [part for _, part in sorted(zip(u[27:31], zip(ADJUST, factors)))]
        return ViewParams(
            *_random_crop(u[:22], height, width, self.scale, self.ratio),
            jitter=tuple(jitter) if u[22] < self.jitter_p else None,
            gray=u[31] < self.gray_p,
            sigma=_between(*self.sigma, u[33]) if u[32] < self.blur_p else None,
            flip=u[34] < self.flip_p,
        )

    def fewest(self, height: int, width: int, views) -> Tuple[int, int]:
        """How many rows and columns of a picture of `height` × `width` pixels these views (ViewParams) need: so many that
        each of their crops still has a view's size."""
        shrink = max(1.0, min(extent / size for p in views for extent, size in zip((p.height, p.width), self.size)))
        return math.ceil(height / shrink), math.ceil(width / shrink)

    def apply(self, picture: np.ndarray, params: ViewParams, full: Optional[Tuple[int, int]] = None) -> np.ndarray:
        """The view `params` of `picture`: uint8 [H, W, 3] → uint8 [*size, 3], a new array. `full` is the (height, width)
        that it had, and that the params are of, if it is a reduced one."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
        p = params
        if full in (None, picture.shape[:2]):
            view = resize(picture[p.top : p.top + p.height, p.left : p.left + p.width], self.size)
        else:
            view = _resize_reduced(picture, p, full, self.size)
        for part, factor in p.jitter or ():
            view = ADJUST[part](view, factor)
        if p.gray:
            view = grayscale(view)
        if p.sigma is not None:
            view = blur(view, p.sigma)
        return cv2.flip(view, 1) if p.flip else view


def _between(low, high, u):
    return low + (high - low) * u


def _random_crop(u, height, width, scale, ratio) -> Tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop from 22 uniform numbers: (top, left, height, width).

    Ten attempts at an area (uniform) and an aspect ratio (log-uniform); the first that fits into the picture is placed
    uniformly. If none fits: the largest central crop of an allowed aspect ratio.
    """
    for area, aspect in zip(u[:10], u[10:20]):
        area = height * width * _between(*scale, area)
        aspect = math.exp(_between(math.log(ratio[0]), math.log(ratio[1]), aspect))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    h = min(height, max(1, round(width / min(ratio))))
    w = min(width, max(1, round(height * max(ratio))))
    return (height - h) // 2, (width - w) // 2, h, w


# --- the resize of Pillow ---------------------------------------------------------------------------------------------


def resize(picture: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased BILINEAR: uint8 [H, W, 3] → uint8 [*size, 3]. Exact to the rounding of the result.

    Pillow rounds between the axes too, so that it may be a level away. The weights are a triangle that grows with the
    factor by which an axis shrinks, where OpenCV's INTER_LINEAR looks at two pixels however much it shrinks, and aliases; where no axis shrinks they are the same.
    """
    height, width = picture.shape[:2]
    if height <= size[0] and width <= size[1]:  # in floats as fast as in uint8, whose weights of 11 bits darken a little
        return _round(cv2.resize(picture.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR))
    planes = np.empty((height, 3, width), np.uint8)  # the colours of a row apart: so both sums are matrix products
    cv2.split(picture, [planes[:, 0], planes[:, 1], planes[:, 2]])
    rows = planes.reshape(height, -1).astype(np.float32)
    some = np.empty((size[0], 3 * width), np.float32)
    for out, seen, weights in _triangles(height, size[0], 8):
        np.matmul(weights, rows[seen], out=some[out])
    some = some.reshape(-1, width)
    view = np.empty((len(some), size[1]), np.float32)
    for out, seen, weights in _triangles(width, size[1], 16):
        np.matmul(some[:, seen], weights.T, out=view[:, out])
    view = _round(view).reshape(size[0], 3, size[1])
    return cv2.merge([view[:, 0], view[:, 1], view[:, 2]])


def _resize_reduced(picture, p, full, size):
    """The crop `p` of a picture that had the size `full`: its borders lie between the pixels that are left."""
    factor = round(max(full) / max(picture.shape))  # the last row and column may stand for fewer pixels than that
    top, left, bottom, right = (x / factor for x in (p.top, p.left, p.top + p.height, p.left + p.width))
    above, before = int(top), int(left)
    part = picture[above : math.ceil(bottom), before : math.ceil(right)]
    box = (left - before, top - above, right - before, bottom - above)
    return np.asarray(Image.fromarray(part).resize(size[::-1], Image.BILINEAR, box=box))


def _round(sums):
    """To uint8. OpenCV rounds halves to the even number, Pillow upwards; hence the small addition."""
    return cv2.convertScaleAbs(sums, beta=2**-10)


@lru_cache(maxsize=512)
def _triangles(source: int, target: int, block: int):
    """The matrix [target, source] of a resize. It is a narrow band: [(`block` outputs, the inputs they see, weights)]."""
    step = source / target
    support = max(step, 1.0)
    outputs = np.arange(-(-target // block) * block).reshape(-1, block)
    centre = (np.minimum(outputs, target - 1) + 0.5) * step
    k = min(source, int((block - 1) * step + 2 * support + 1.5))
    first = np.minimum(np.maximum(centre[:, 0] - support, 0).astype(int), source - k)
    distance = (first[:, None, None] + 0.5 - centre[:, :, None]) + np.arange(k)
    weights = np.maximum(0, 1 - np.abs(distance) / support)
    weights /= weights.sum(axis=2, keepdims=True)  # at the border the triangle is cut and its rest weighs more
    bands = zip(range(0, target, block), first.tolist(), weights.astype(np.float32))
    return [(slice(i, min(i + block, target)), slice(j, j + k), w[:target - i]) for i, j, w in bands]


# --- colour, blur -----------------------------------------------------------------------------------------------------


_LEVELS = np.arange(256, dtype=np.float32)


def _blend_table(target: float, factor: float) -> np.ndarray:
    """target + factor · (level − target) for the 256 levels. Pillow cuts the fraction off instead of rounding."""
    blend = target + np.float32(factor) * (_LEVELS - np.float32(target))
    return np.minimum(np.maximum(blend, 0), 255).astype(np.uint8)


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black. Pillow's numbers exactly."""
    return cv2.LUT(view, _blend_table(0, factor))


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey of the view. Pillow's numbers exactly, but for a mean that rounds the other way."""
    mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
    return cv2.LUT(view, _blend_table(int(mean + 0.5), factor))


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey of each pixel. Within ±1 level of Pillow."""
    # OpenCV rounds; −0.498 makes that cut off, where −0.5 would turn whole numbers into halves.
    return cv2.addWeighted(view, factor, grayscale(view), 1 - factor, -0.498)


def adjust_hue(view: np.ndarray, turns: float) -> np.ndarray:
    """Turn the hue in floating point: exact to the rounding of the result, and faster than OpenCV's 8-bit HSV.

    Pillow's HSV has 8 bits, and hue, saturation and turn are cut off to them: where the chroma is high, Pillow is up
    to a dozen levels away from the exact colour.
    """
    hsv = cv2.cvtColor(view.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += 360 * (turns % 1)  # OpenCV wraps above 360°, but not below 0
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


ADJUST = {  # the parts of the jitter, in the order in which their factors are drawn
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def grayscale(view: np.ndarray) -> np.ndarray:
    """Three equal channels of luma."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """The true Gaussian, cut at 3σ (below σ = 1/6 that is the pixel itself), with the border repeated.

    Pillow's GaussianBlur is an approximation by three box blurs. The 8-bit cv2.GaussianBlur is the same as this, but
    slower and with coarser weights.
    """
    kernel = cv2.getGaussianKernel(2 * round(3 * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
