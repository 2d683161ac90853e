"""Dense correspondence across views (paper, section 3.3): which key position does a query position belong to?"""

import paddle

from ppdensecl import parallel, rng
from ppdensecl.machine import to_device


def match(query, key):
    """For each query position the key position of greatest similarity, image by image (paper, equation 2).

    query, key: [N, P, C] float, normalised over C. Returns [N, P] int64; of equal maxima the first.
    """
    with paddle.amp.auto_cast(enable=False):  # in half precision many similarities are equal, and the first would win
        return paddle.argmax(paddle.matmul(query, key, transpose_y=True), axis=2)


def random_match(batch, query_positions, key_positions, seed, step):
    """A uniformly random key position for each query position: the control of the paper's Table 6. [N, P] int64."""
    draw = rng.generator(seed, rng.Purpose.RANDOM_MATCH, step, parallel.rank())
    return to_device(draw.integers(0, key_positions, (batch, query_positions)))


def take(key, index):
    """The matched keys: key [N, P, D], index [N, Q] int64 → [N, Q, D]."""
    n, p, d = key.shape
    rows = index + paddle.arange(n, dtype="int64").unsqueeze(1) * p
    return paddle.gather(key.reshape([n * p, d]), rows.flatten()).reshape([n, -1, d])
