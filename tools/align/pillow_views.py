"""The augmentations as torchvision computes them on Pillow images, and two of them in float64."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def pillow_hue(image, turns):
    """torchvision's adjust_hue on a Pillow image: the 8-bit H channel of HSV is shifted and wraps."""
    hue, saturation, value = image.convert("HSV").split()
    hue = np.asarray(hue) + np.array(int(turns * 255) % 256, np.uint8)
    return Image.merge("HSV", (Image.fromarray(hue), saturation, value)).convert("RGB")


def pillow_view(picture, p, size):
    """The pipeline of the paper on a Pillow image, from the same params: uint8 [*size, 3]."""
    image = Image.fromarray(picture).crop((p.left, p.top, p.left + p.width, p.top + p.height))
    image = image.resize(size[::-1], Image.BILINEAR)
    for part, factor in p.jitter or ():
        image = pillow_hue(image, factor) if part == "hue" else ENHANCE[part](image).enhance(factor)
    if p.gray:
        image = image.convert("L").convert("RGB")
    if p.sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(p.sigma))
    return np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if p.flip else image)


def exact_hue(picture, turns):
    """The same turn of the hue in float64: [H, W, 3] on a scale of 0 to 255."""
    rgb = picture / 255.0
    value, chroma = rgb.max(2), rgb.max(2) - rgb.min(2)
    r, g, b = rgb.transpose(2, 0, 1)
    c = np.where(chroma > 0, chroma, 1)
    sector = np.select([value == r, value == g], [(g - b) / c, 2 + (b - r) / c], 4 + (r - g) / c) + 6 * turns
    # The hexagon's three faces: a channel is at most `value`, at least `value - chroma`, and linear in between.
    faces = [np.clip(np.minimum(k, 4 - k), 0, 1) for k in ((offset + sector) % 6 for offset in (5, 3, 1))]
    return 255 * np.stack([value - chroma * face for face in faces], 2)


def true_gaussian(picture, sigma):
    """The Gaussian in float64, out to 5σ, the border repeated: [H, W, 3] on a scale of 0 to 255."""
    reach = int(np.ceil(5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    blurred = picture.astype("float64")
    for axis in (0, 1):
        padded = np.pad(blurred, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
        blurred = windows @ (kernel / kernel.sum())
    return blurred
