"""The dictionary of negatives as a ring buffer (He et al., "Momentum Contrast", CVPR 2020, section 3.2)."""

import paddle
import paddle.nn.functional as F
from paddle import nn


class NegativeQueue(nn.Layer):
    """The newest `length` keys of all processes.

    State (in the checkpoint): `keys` [K, D] float, rows of unit length, at first L2-normalised Gaussian noise; `pointer`
    [1] int64, the row that is written next. Nothing here waits for the device, so the pointer stays a tensor.
    """

    def __init__(self, length, dim):
        super().__init__()
        self.length = length
        self.register_buffer("keys", F.normalize(paddle.randn([length, dim]), axis=1))
        self.register_buffer("pointer", paddle.zeros([1], dtype="int64"))

    @paddle.no_grad()
    def enqueue(self, keys):
        """Overwrites the oldest rows by keys [n, D]. Any n will do: the end wraps around, of n > K the last K stay."""
        n = keys.shape[0]
        kept = min(n, self.length)
        rows = (self.pointer + paddle.arange(n - kept, n, dtype="int64")) % self.length
        paddle.scatter_(self.keys, rows, keys[n - kept:].astype(self.keys.dtype))
        paddle.assign((self.pointer + n) % self.length, self.pointer)
