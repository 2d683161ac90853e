"""What decode() makes of every kind of picture file, compared with Pillow, and of every kind of damage."""

import io
import os
import pickle
import subprocess
import sys
import zlib

from PIL import Image, ImageOps

import cv2
import numpy as np
import pytest

from ppdensecl.data.picture import MAX_PIXELS, UndecodableError, decode


def smooth(height=45, width=60, channels=3):
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (5, 6, channels), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


PICTURE = Image.fromarray(smooth())
GREY16 = smooth(channels=3)[:, :, 0].astype(np.uint16) * 256 + 77


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def with_alpha(picture, low=0):
    picture = picture.copy()
    picture.putalpha(Image.fromarray(np.linspace(low, 255, 45 * 60).reshape(45, 60).astype(np.uint8)))
    return picture


def by_pillow(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


SAME_AS_PILLOW = {
    "jpeg": encode(PICTURE, "JPEG", quality=90),
    "jpeg progressive": encode(PICTURE, "JPEG", progressive=True),
    "jpeg grey": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg without subsampling": encode(PICTURE, "JPEG", subsampling=0),
    "jpeg restart markers": cv2.imencode(".jpg", smooth(), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes(),
    "jpeg 1x1": encode(Image.new("RGB", (1, 1), (200, 100, 50)), "JPEG"),
    "png": encode(PICTURE, "PNG"),
    "png palette": encode(PICTURE.quantize(16), "PNG"),
    "png palette with a transparent colour": encode(PICTURE.quantize(16), "PNG", transparency=3),
    "png black and white": encode(PICTURE.convert("1"), "PNG"),
    "png grey with alpha": encode(with_alpha(PICTURE.convert("L")), "PNG"),
    "png rgba": encode(with_alpha(PICTURE), "PNG"),
    "png 16 bits rgb": cv2.imencode(".png", smooth().astype(np.uint16) * 256 + 99)[1].tobytes(),
    "png 1x1": encode(Image.new("L", (1, 1), 77), "PNG"),
    "gif": encode(PICTURE, "GIF"),
    "gif animated": encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)]),
    "bmp": encode(PICTURE, "BMP"),
    "tiff": encode(PICTURE, "TIFF"),
    "tiff lzw": encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encode(PICTURE.convert("CMYK"), "TIFF"),
    "tiff rgba": encode(with_alpha(PICTURE), "TIFF"),
    "webp": encode(PICTURE, "WEBP"),
    "webp rgba": encode(with_alpha(PICTURE, low=1), "WEBP", lossless=True),
    "ppm": encode(PICTURE, "PPM"),
    "jpeg 2000": encode(PICTURE, "JPEG2000"),
}


@pytest.mark.parametrize("kind", SAME_AS_PILLOW)
def test_same_as_pillow(kind):
    data = SAME_AS_PILLOW[kind]
    pixels, expected = decode(data, kind), by_pillow(data)
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, expected)


def test_channels_are_red_green_blue():
    red = Image.new("RGB", (8, 8), (250, 120, 10))
    for kind in ("PNG", "JPEG", "GIF"):
        assert np.abs(decode(encode(red, kind), kind)[4, 4].astype(int) - (250, 120, 10)).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    upright = smooth()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=oriented(orientation), quality=95)
    pixels = decode(data, kind)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3


def test_damaged_exif_is_no_reason_to_lose_a_picture():
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encode(PICTURE, kind, exif=b"Exif\0\0nonsense"), kind).shape == (45, 60, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_byte(kind):
    pixels = decode(encode(Image.fromarray(GREY16), kind), kind)
    assert (pixels == (GREY16 // 256)[:, :, None]).all() and pixels.shape == (45, 60, 3)


def test_sixteen_bit_pgm():
    data = b"P5 60 45 65535\n" + GREY16.astype(">u2").tobytes()
    assert (decode(data, "pgm") == (GREY16 // 256)[:, :, None]).all()


def test_thirty_two_bits_are_refused():
    for mode in ("F", "I"):
        with pytest.raises(UndecodableError, match="32-bit"):
            decode(encode(PICTURE.convert("L").convert(mode), "TIFF"), "depth.tif")


@pytest.mark.parametrize("kind", [kind for kind in SAME_AS_PILLOW if "animated" not in kind])
def test_cut_short(kind):
    data = SAME_AS_PILLOW[kind]
    for kept in (2, 10, len(data) // 3, len(data) * 2 // 3, len(data) - 40):
        if 0 < kept < len(data):
            with pytest.raises(UndecodableError):
                decode(data[:kept], kind)


def test_cut_short_jpeg_with_a_thumbnail():
    thumbnail = encode(PICTURE.resize((16, 12)), "JPEG")
    data = encode(PICTURE, "JPEG")
    block = b"Exif\0\0" + thumbnail  # as a camera stores it: a whole JPEG, end marker included, inside the header
    data = data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    assert decode(data, "whole").shape == (45, 60, 3)
    for missing in (2, 100, 400):
        with pytest.raises(UndecodableError, match="cut short"):
            decode(data[:-missing], "cut")


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "png", "gif", "webp", "tiff"])
@pytest.mark.parametrize("junk", [b"\0" * 1000, b"junk", b"\xff\xd8\xff\xda\x00\x00 a preview that was cut"])
def test_junk_after_the_end_is_fine(kind, junk):
    assert (decode(SAME_AS_PILLOW[kind] + junk, kind) == decode(SAME_AS_PILLOW[kind], kind)).all()


def test_a_flipped_bit_in_a_png():
    data = bytearray(encode(PICTURE, "PNG"))
    data[len(data) // 2] ^= 16
    with pytest.raises(UndecodableError, match="checksum"):
        decode(bytes(data), "flipped.png")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not a picture"),
        (bytes(5000), "not a picture"),
        (b"\xff\xd8" + b"junk" * 100, "cut short"),
        (b"\xff\xd8\xff\xd9", "damaged|not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # Pillow would start Ghostscript
    ],
)
def test_no_picture(data, reason):
    with pytest.raises(UndecodableError, match=reason) as caught:
        decode(data, "x/y.jpg")
    assert caught.value.name == "x/y.jpg" and str(caught.value) == f"x/y.jpg: {caught.value.reason}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_too_many_pixels():
    jpeg = bytearray(encode(PICTURE, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = (60000).to_bytes(2, "big") * 2
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT"
    assert 60000 * 60000 > MAX_PIXELS
    for data in (bytes(jpeg), png):
        with pytest.raises(UndecodableError, match="limit"):
            decode(data, "bomb")


def test_nothing_is_written_to_stderr(tmp_path):
    for name in ("jpeg", "jpeg progressive", "png", "tiff", "gif", "bmp", "webp"):
        (tmp_path / name).write_bytes(SAME_AS_PILLOW[name][:-50])
    (tmp_path / "flipped").write_bytes(SAME_AS_PILLOW["png"].replace(b"IDAT", b"IDAT\1", 1))
    code = (
        "import os, sys\nfrom ppdensecl.data.picture import UndecodableError, decode\n"
        "for name in os.listdir(sys.argv[1]):\n"
        "    try:\n        decode(open(os.path.join(sys.argv[1], name), 'rb').read(), name)\n"
        "    except UndecodableError:\n        print(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=os.getcwd())
    assert len(run.stdout.splitlines()) == 8 and run.stderr == ""


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("fewest, expected", [((400, 600), (400, 600)), ((201, 300), (400, 600)), ((200, 300), (200, 300)),
                                              ((130, 160), (200, 300)), ((100, 101), (100, 150)), ((50, 75), (50, 75)), ((1, 1), (50, 75))])
def test_a_jpeg_is_decoded_no_smaller_than_asked_for(orientation, fewest, expected):
    """Asked for and answered as it is seen upright."""
    upright = Image.fromarray(smooth(400, 600))
    stored = upright.transpose({3: Image.ROTATE_180, 6: Image.ROTATE_90, 8: Image.ROTATE_270}[orientation]) if orientation > 1 else upright
    data, asked = encode(stored, "JPEG", quality=95, exif=oriented(orientation)), []
    pixels = decode(data, "large", lambda *size: asked.append(size) or fewest)
    assert asked == [(400, 600)] and pixels.shape == (*expected, 3)
    assert np.abs(pixels - np.asarray(upright.resize(expected[::-1], Image.BOX), "float64")).mean() < 2


def test_what_is_no_jpeg_is_decoded_in_full():
    assert decode(encode(PICTURE, "PNG"), "png", lambda *_: pytest.fail("was asked")).shape == (45, 60, 3)
