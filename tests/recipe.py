"""The inputs behind the authors' numbers: weights, queues, pictures and permutations from numpy and a name alone.

Each array has a random stream of its own, seeded by its name. numpy promises that `RandomState` streams never change. All
values are rounded to float16 first, so that float32 and float64 runs start from exactly the same numbers.
"""

import zlib

import numpy as np

SEED = 20210619


def stream(name):
    return np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)


def rounded(values):
    return np.asarray(values, dtype=np.float64).astype(np.float16).astype(np.float32)


def weight(name, shape):
    """An entry of the authors' encoder (`0.conv1.weight`, `1.mlp.0.bias`, …) in PyTorch's shape; the same in both encoders."""
    noise = stream(name).standard_normal(tuple(shape))
    kind = name.rpartition(".")[2]
    if kind == "running_mean":
        return rounded(0.1 * noise)
    if kind == "running_var":
        return rounded(1 + 0.2 * abs(noise))
    if noise.ndim > 1:
        return rounded(np.sqrt(2 / np.prod(noise.shape[1:])) * noise)
    return rounded(1 + 0.1 * noise if kind == "weight" else 0.05 * noise)  # a BatchNorm's scale, or any bias


def queue(name, dim, length):
    """`queue` or `queue2`: [dim, length], columns of unit length (but for the rounding)."""
    noise = stream(f"{name}_{dim}_{length}").standard_normal((dim, length))
    return rounded(noise / np.sqrt((noise * noise).sum(axis=0, keepdims=True)))


def images(step, batch, size, rank=0):
    """[batch, 2 views, 3, size, size], already normalised: 8×8 coloured cells, in the key's view a quarter of the width
    further right, and each view's own noise."""
    numbers = stream(f"img_step{step}_rank{rank}")
    cells = numbers.standard_normal((batch, 3, 8, 8))
    picture = cells.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
    query = picture + 0.5 * numbers.standard_normal(picture.shape)
    key = np.roll(picture, size // 4, axis=3) + 0.5 * numbers.standard_normal(picture.shape)
    return rounded(np.stack([query, key], axis=1))


def permutation(step, rows):
    """Row i of the shuffled key batch is row permutation[i]."""
    return stream(f"perm_step{step}").permutation(rows).astype(np.int64)
