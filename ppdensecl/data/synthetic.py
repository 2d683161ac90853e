"""Endless pictures with a known truth: textured scenes of several objects, with masks, boxes and classes.

For trying out the whole road from pre-training to transfer without any download. A class is a shape together with an inner
texture; colours, sizes, rotations, places and backgrounds are drawn from the same distributions for every class, so that
colour tells nothing about it. A scene is a pure function of (seed, index).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

from ppdensecl.rng import Purpose, generator

CLASSES = ("target", "chessboard", "pennant", "starfish", "wheel", "cross", "pinwheel", "moon")

LEAST_VISIBLE = 0.15  # part of an object's area; what would show less is not drawn


@dataclass
class Scene:
    """A picture and the truth about it; the k-th of the n objects has instance id k + 1."""

    picture: np.ndarray  # uint8 [H, W, 3], RGB
    mask: np.ndarray  # uint8 [H, W]: 0 background, otherwise c for CLASSES[c - 1]
    instances: np.ndarray  # int32 [H, W]: 0 background, otherwise the instance id
    boxes: np.ndarray  # float32 [n, 4]: x1, y1, x2, y2 in pixels around what is visible; x2 and y2 are exclusive
    classes: np.ndarray  # int64 [n]: as in `mask`


class SyntheticSource:
    """`count` scenes of size (height, width) in pixels, as a source of pictures (see `sources.py`).

    Two to five objects a scene, each with a diameter of 20 to 50 % of the short side before it is stretched a little;
    they may hide parts of each other and reach over the border.
    """

    def __init__(self, count, seed=0, size=(128, 160)):
        if count < 1 or min(size) < 32:
            raise ValueError(f"at least one scene of at least 32 pixels a side, got count {count}, size {tuple(size)}")
        self.count, self.seed, self.size = count, seed, tuple(size)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"synthetic scene {i} of seed {self.seed}"

    def picture(self, i: int, fewest=None) -> np.ndarray:
        """uint8 [H, W, 3], RGB, in full."""
        return self.scene(i).picture

    def read(self, i: int) -> bytes:
        """The picture as a PNG file."""
        return cv2.imencode(".png", self.picture(i)[:, :, ::-1])[1].tobytes()

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.count, self.seed, self.size)).encode()).hexdigest()

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        return _scene(generator(self.seed, Purpose.SYNTHETIC, i), *self.size)


def _scene(rng, height, width):
    """Composed from front to back: what an object shows is settled when it is placed, whatever is put behind it."""
    colour = np.zeros((height, width, 3), np.float32)
    light = np.ones((height, width), np.float32)  # the share of a pixel that what lies further back still gets
    instances = np.zeros((height, width), np.int32)
    classes, boxes = [], []
    wanted = rng.integers(2, 6)
    for _ in range(3 * wanted):  # tries, of which some find no room
        if len(classes) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        alpha, paint, top, left = _object(rng, label, height, width)
        # The part of the object's patch that lies in the picture.
        inside = (slice(max(0, -top), height - top), slice(max(0, -left), width - left))
        area = np.count_nonzero(alpha >= 0.5)
        alpha, paint = alpha[inside], paint[inside]
        top, left = max(top, 0), max(left, 0)
        here = (slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1]))
        visible = (alpha >= 0.5) & (instances[here] == 0)
        if np.count_nonzero(visible) < LEAST_VISIBLE * area:
            continue
        classes.append(label + 1)
        instances[here][visible] = len(classes)
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
        colour[here] += (light[here] * alpha)[:, :, None] * paint
        light[here] *= 1 - alpha
    background = _background(rng, height, width)
    # In place from here on: fresh memory of this size costs more than the sums.
    background *= light[:, :, None]
    colour += background
    colour *= 240
    colour += np.frombuffer(rng.bytes(colour.size), np.uint8).reshape(colour.shape) & 15  # grain
    picture = np.clip(colour, 0, 255, out=colour).astype(np.uint8)
    mask = np.array([0, *classes], np.uint8)[instances]
    return Scene(picture, mask, instances, np.array(boxes, np.float32), np.array(classes, np.int64))


def _object(rng, label, height, width):
    """(alpha [h, w], paint [h, w, 3], top, left): a patch around an object, which may reach over the picture's border."""
    radius = 0.5 * min(height, width) * rng.uniform(0.2, 0.5)
    x, y = rng.uniform(0.3 * radius, (width - 0.3 * radius, height - 0.3 * radius))
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    reach = int(1.2 * radius) + 2
    left, top = int(x) - reach, int(y) - reach
    steps = np.arange(2 * reach + 1, dtype=np.float32)
    dx, dy = (steps + (left - x))[None, :] / radius, (steps + (top - y))[:, None] / radius
    # u, v: the object's own coordinates, in which it fills the unit circle.
    u = (np.cos(turn) * dx + np.sin(turn) * dy).astype(np.float32) * np.float32(stretch)
    v = (np.cos(turn) * dy - np.sin(turn) * dx).astype(np.float32) / np.float32(stretch)
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    outline, pattern = _SHAPES[label](rng, u, v, r, angle)
    alpha = np.clip(0.5 - outline * np.float32(radius), 0, 1)  # one pixel from outside to inside
    pattern = np.clip(0.5 + 2 * pattern, 0, 1)[:, :, None]
    ink, ground = _two_colours(rng)
    shade = 0.85 + 0.25 * (u if rng.random() < 0.5 else -v)
    return alpha, (ground + pattern * (ink - ground)) * shade[:, :, None], top, left


# Each shape: (rng, u, v, r, angle) → (signed distance to the outline in radii, negative inside; pattern about -1..1).


def _target(rng, u, v, r, angle):
    return r - 1, _wave(rng, r, 2.5, 3.5)


def _chessboard(rng, u, v, r, angle):
    return _polygon(r, angle, 4), 2 * _wave(rng, u, 1.2, 1.8) * _wave(rng, v, 1.2, 1.8)


def _pennant(rng, u, v, r, angle):
    return _polygon(r, angle, 3), _wave(rng, u, 2, 3)


def _starfish(rng, u, v, r, angle):
    # Of one half of one arm: the line from its tip (1, 0) to the corner between two arms.
    bent = np.abs(_folded(angle, 5))
    along, across = r * np.cos(bent), r * np.sin(bent)
    corner = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    length = np.hypot(1 - corner[0], corner[1])
    outline = ((along - 1) * corner[1] + across * (1 - corner[0])) / length
    return outline.astype(np.float32), _wave(rng, u, 2, 3) + _wave(rng, v, 2, 3) - 0.7


def _wheel(rng, u, v, r, angle):
    return np.abs(r - 0.72) - 0.28, np.sin(angle * rng.integers(6, 11) + rng.uniform(0, 6))


def _cross(rng, u, v, r, angle):
    across, along = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    spots = rng.random((7, 7), dtype=np.float32) * 2 - 1
    return np.maximum(across - 0.3, along - 0.95), cv2.resize(spots, r.shape[::-1], interpolation=cv2.INTER_CUBIC)


def _pinwheel(rng, u, v, r, angle):
    return _polygon(r, angle, 6), np.sin(angle * rng.integers(3, 5) + 6 * r * rng.choice((-1, 1)) + rng.uniform(0, 6))


def _moon(rng, u, v, r, angle):
    zigzag = np.abs((2 * v) % 1 - 0.5)
    return np.maximum(r - 1, 0.85 - np.hypot(u - 0.6, v)), _wave(rng, u + zigzag, 1.6, 2.4)


_SHAPES = (_target, _chessboard, _pennant, _starfish, _wheel, _cross, _pinwheel, _moon)


def _wave(rng, x, low, high):
    """A sine of x with low … high periods per unit, at a random phase."""
    return np.sin(np.float32(2 * np.pi * rng.uniform(low, high)) * x + np.float32(rng.uniform(0, 2 * np.pi)))


def _folded(angle, corners):
    """The angle to the nearest of the corners, the first of which lies at angle 0."""
    sector = np.float32(2 * np.pi / corners)
    return (angle + sector / 2) % sector - sector / 2


def _polygon(r, angle, corners):
    half = np.float32(np.pi / corners)
    return r * np.cos(half - np.abs(_folded(angle, corners))) - np.cos(half)


def _two_colours(rng):
    """Two RGB colours, float32 0..1, that differ in every channel."""
    first = rng.random(3)
    return first.astype(np.float32), ((first + rng.uniform(0.3, 0.7, 3)) % 1).astype(np.float32)


def _background(rng, height, width):
    """float32 [H, W, 3], about 0..1: one of five textures between two colours, and a slow drift of colour."""
    cloud = np.zeros((height, width), np.float32)
    cells = int(rng.integers(2, 5))
    for octave in range(4):
        dots = rng.random((cells << octave, cells << octave), dtype=np.float32)
        cloud += cv2.resize(dots, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    cloud = cv2.normalize(cloud, None, 0, 1, cv2.NORM_MINMAX)
    turn = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * np.float32(np.cos(turn))
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(np.sin(turn))
    kind = rng.integers(5)
    if kind == 0:  # clouds
        field = cloud
    elif kind == 1:  # a gradient with some cloud
        field = 0.5 + 0.35 * (x + y) + 0.4 * (cloud - 0.5)
    elif kind == 2:  # wavy bands
        field = 0.5 + 0.5 * np.sin(rng.uniform(6, 25) * (x + y) + rng.uniform(2, 12) * cloud)
    elif kind == 3:  # flat patches
        field = np.floor(cloud * rng.integers(3, 7)) / 5
    else:  # tiles
        field = 0.5 + 0.3 * np.sign(np.sin(rng.uniform(10, 30) * x) * np.sin(rng.uniform(10, 30) * y)) + 0.4 * (cloud - 0.5)
    first, second = _two_colours(rng)
    contrast = np.float32(rng.uniform(0.3, 1))
    drift = first + np.float32(0.3) * (rng.random((3, 3, 3), dtype=np.float32) - np.float32(0.5))
    picture = cv2.resize(drift, (width, height), interpolation=cv2.INTER_LINEAR)
    picture += field[:, :, None] * (contrast * (second - first))
    return picture
