"""InfoNCE against a queue of negatives (van den Oord et al., 2018; DenseCL, equations 1 and 3).

For each query q with its positive k₊ and all negatives n of the queue, every similarity divided by τ:

    loss = −log( exp(q·k₊/τ) / ( exp(q·k₊/τ) + Σₙ exp(q·n/τ) ) )

the cross entropy of [q·k₊, q·n₁, …]/τ with label 0. The formula printed in the DenseCL paper lacks 1/τ in its denominator;
the authors' code has it, and so have we.

`info_nce` walks the queue in chunks and never holds the [M, K] logits: only the query needs a gradient, so one pass gives
the loss and its gradient, and the backward pass is a scaling. `info_nce_plain` is the textbook form for comparison.
"""

import paddle
from paddle.autograd import PyLayer

# Logits held at a time. On a CPU 4 MiB of float32: such a block stays near the cores, and malloc serves it from memory it
# has, where larger ones are fresh pages each time, which costs more than the product that fills them. A GPU has neither
# trouble, but needs large products.
LOGITS = {"cpu": 2**20, "gpu": 2**24}
MIN_CHUNK = 256  # rows of the queue: narrower products are slow
# Unit vectors have logits within ±1/τ. Up to this bound neither exp nor the sum of 10⁷ of them leaves float32's range.
SAFE_LOGIT = 70.0


@paddle.no_grad()
def _one_pass(query, positive, negatives, temperature, watch):
    """(loss [], its gradient for the query [M, D], watched)."""
    q = query / temperature
    pos = (q * positive).sum(axis=1, keepdim=True)  # [M, 1]
    if 1.0 / temperature <= SAFE_LOGIT:
        highest, shift = None, 0.0
    else:
        highest = shift = pos  # running maximum of the logits: exp never overflows
    total = paddle.exp(pos - shift)  # [M, 1], Σ exp(logit − shift), the positive's first
    weighted = total * positive  # [M, D], Σ exp(logit − shift) · key
    hardest = None
    chunk = max(LOGITS["cpu" if query.place.is_cpu_place() else "gpu"] // query.shape[0], MIN_CHUNK)
    for start in range(0, negatives.shape[0], chunk):
        keys = negatives[start:start + chunk]  # [c, D]
        logits = paddle.matmul(q, keys, transpose_y=True)  # [M, c]
        if watch or highest is not None:
            chunk_max = logits.max(axis=1, keepdim=True)
            hardest = chunk_max if hardest is None else paddle.maximum(hardest, chunk_max)
        if highest is not None:
            raised = paddle.maximum(highest, chunk_max)
            rescale = paddle.exp(highest - raised)
            total, weighted = total * rescale, weighted * rescale
            highest = shift = raised
            logits.subtract_(shift)
        p = logits.exp_()
        total = total + paddle.matmul(p, paddle.ones([keys.shape[0], 1], p.dtype))  # a third of the time of p.sum()
        weighted = weighted + paddle.matmul(p, keys)
        del logits, p  # the next product may have their memory
    loss = (paddle.log(total) + shift - pos).mean()
    gradient = (weighted / total - positive) / (temperature * query.shape[0])
    if not watch:
        return loss, gradient, {}
    negative = (query @ negatives.mean(axis=0)).mean()
    accuracy = (pos > hardest).astype(q.dtype).mean()
    return loss, gradient, {"accuracy": accuracy, "positive": pos.mean() * temperature, "negative": negative}


class _WithGradient(PyLayer):
    """The loss as a function of the query, whose gradient is known already."""

    @staticmethod
    def forward(ctx, query, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        if paddle.is_grad_enabled():  # only under create_graph; the gradient is a constant to autograd
            raise NotImplementedError("info_nce has first derivatives only: no create_graph=True")
        (gradient,) = ctx.saved_tensor()
        return grad_loss * gradient, None, None


def info_nce(query, positive, negatives, temperature, watch=False):
    """Mean InfoNCE loss of M queries against one positive each and K shared negatives.

    Args:
        query: [M, D] float, rows of unit length; the only argument that gets a gradient (first order only).
        positive: [M, D] float, rows of unit length.
        negatives: [K, D] float, rows of unit length (a `NegativeQueue`'s keys).
        temperature: τ > 0.
        watch: also return the numbers people watch, which cost a little more.

    Returns:
        (loss, watched): a 0-d tensor in float32 (float64 for float64 input), and a dict of 0-d tensors `accuracy` (share
        of queries whose positive beats every negative), `positive` and `negative` (mean cosine similarities), empty
        without `watch`.
    """
    dtype = paddle.float64 if query.dtype == paddle.float64 else paddle.float32
    # Paddle 2.6 copies a tensor that is of the type already.
    query, positive, negatives = (t if t.dtype == dtype else t.astype(dtype) for t in (query, positive, negatives))
    with paddle.amp.auto_cast(enable=False):  # sums over a queue need float32
        loss, gradient, watched = _one_pass(query, positive, negatives, float(temperature), watch)
    return _WithGradient.apply(query, loss, gradient), watched


def info_nce_plain(query, positive, negatives, temperature):
    """The same loss from the [M, 1 + K] logits, with autograd's gradient; memory grows with M·K. Returns a 0-d tensor.

    Not through `F.cross_entropy`: on the CPU Paddle's clips log-probabilities at −64, which a small τ reaches.
    """
    pos = (query * positive).sum(axis=1, keepdim=True)
    logits = paddle.concat([pos, paddle.matmul(query, negatives, transpose_y=True)], axis=1) / temperature
    return (paddle.logsumexp(logits, axis=1) - logits[:, 0]).mean()
