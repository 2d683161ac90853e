"""From the bytes of a picture file to RGB pixels, or to a reason why not.

All by Pillow: OpenCV blends a TIFF's alpha with black, overlooks a WebP's orientation, reads no GIF, its libpng writes to
stderr, and its libjpeg-turbo, which gives the same pixels, is built without SIMD instructions in the wheels of 4.5.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Callable, Optional, Tuple

from PIL import Image, ImageOps, UnidentifiedImageError

import cv2
import numpy as np

MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB

# Not every format that Pillow knows: some of them start other programs.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")

_ORIENTATION = 0x0112  # the EXIF tag

# Neither a stuffed byte, nor padding, nor one of the markers that stand alone (TEM, restarts, SOI).
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class UndecodableError(Exception):
    """Not a usable picture: `name` is the file, `reason` what is wrong with it, in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both as arguments, so that it can be pickled
        self.name = name
        self.reason = reason

    def __str__(self):
        return f"{self.name}: {self.reason}"


def decode(data: bytes, name: str, fewest: Optional[Callable[[int, int], Tuple[int, int]]] = None) -> np.ndarray:
    """The picture in `data` as uint8 [H, W, 3], RGB, upright; `name` is only for the error.

    `fewest(height, width)` is asked how many rows and columns of a JPEG are needed at least; with as many it may come as a
    half, a quarter or an eighth of its size, which libjpeg decodes that much faster.

    The EXIF orientation is applied. Grey, palette and CMYK become RGB; alpha is dropped (the colours under it remain
    as stored); 16-bit samples keep their upper byte; of an animation the first frame counts. Raises UndecodableError
    for what is no picture, is cut short, has more than MAX_PIXELS, or has 32-bit samples.
    """
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data, name)
    try:
        with warnings.catch_warnings():  # on oddities of the file: it can be read or it cannot
            warnings.simplefilter("ignore")
            return _decode_with_pillow(data, name, fewest)
    except UndecodableError:
        raise
    except UnidentifiedImageError:
        raise UndecodableError(name, "not a picture of a known format" if data else "the file is empty") from None
    except Image.DecompressionBombError as error:
        raise UndecodableError(name, str(error)) from None
    except Exception as error:  # damaged data makes Pillow's readers raise whatever Python can
        raise UndecodableError(name, f"damaged: {error or type(error).__name__}") from None


def _check_jpeg(data, name):
    """Walks the markers up to the end of the (first) picture; libjpeg would fill what is cut off with grey.

    Searching for an end marker from the back could find that of an appended preview or of the EXIF thumbnail.
    """
    at = 2
    while True:
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            raise UndecodableError(name, "the JPEG data is cut short")
        at = found.end()
        marker = data[at - 1]
        if marker == 0xD9:  # end of image
            return
        if marker in _JPEG_FRAMES:
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (3, 5))
            _check_size(width, height, name)
        at += int.from_bytes(data[at : at + 2], "big")


def _check_size(width, height, name):
    if width * height > MAX_PIXELS:
        raise UndecodableError(name, f"{width} x {height} pixels are more than the limit of {MAX_PIXELS / 1e6:.0f} million")


def _decode_with_pillow(data, name, fewest):
    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(*picture.size, name)
    kind = picture.format
    if kind == "PNG":
        picture.verify()  # the checksums, which reading alone ignores; it uses the object up
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    elif kind == "JPEG" and fewest:
        swap = 1 if picture.getexif().get(_ORIENTATION, 1) < 5 else -1  # from 5 on rows are columns
        rows, columns = fewest(*picture.size[::-swap])[::swap]
        picture.draft(None, (columns, rows))
    picture.load()
    if kind != "TIFF":  # whose orientation load() has applied
        try:
            if picture.getexif().get(_ORIENTATION, 1) != 1:  # exif_transpose would copy an upright picture too
                picture = ImageOps.exif_transpose(picture)
        except Exception:  # a damaged EXIF block says nothing about the pixels
            pass
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind != "TIFF"):
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise UndecodableError(name, "32-bit samples, whose range is unknown")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    # Pillow holds RGB in four bytes; to drop the fourth is faster in OpenCV.
    pixels = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint8).reshape(picture.height, picture.width, 4)
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
