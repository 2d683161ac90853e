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

CHUNK = 4096  # rows of the queue in one pass: [1568, 4096] float32 logits are 25 MB
# Unit vectors have logits within ±1/τ. Up to this bound neither exp nor the sum of 10⁷ of them leaves float32's range.
SAFE_LOGIT = 70.0


class _InfoNCE(PyLayer):
    @staticmethod
    def forward(ctx, query, positive, negatives, temperature, watch):
        q = query / temperature
        pos = (q * positive).sum(axis=1, keepdim=True)  # [M, 1]
        if 1.0 / temperature <= SAFE_LOGIT:
            highest, shift = None, 0.0
        else:
            highest = shift = pos  # running maximum of the logits: exp never overflows
        total = paddle.exp(pos - shift)  # [M, 1], Σ exp(logit − shift), the positive's first
        weighted = total * positive  # [M, D], Σ exp(logit − shift) · key
        hardest = None
        for start in range(0, negatives.shape[0], CHUNK):
            keys = negatives[start:start + CHUNK]  # [c, D]
            logits = paddle.matmul(q, keys, transpose_y=True)  # [M, c]
            if watch or highest is not None:
                chunk_max = logits.max(axis=1, keepdim=True)
                hardest = chunk_max if hardest is None else paddle.maximum(hardest, chunk_max)
            if highest is not None:
                raised = paddle.maximum(highest, chunk_max)
                rescale = paddle.exp(highest - raised)
                total, weighted = total * rescale, weighted * rescale
                highest = shift = raised
                logits = logits - shift
            p = logits.exp_()
            total = total + p.sum(axis=1, keepdim=True)
            weighted = weighted + paddle.matmul(p, keys)
        loss = (paddle.log(total) + shift - pos).mean()
        ctx.save_for_backward((weighted / total - positive) / (temperature * query.shape[0]))
        if not watch:
            return loss
        accuracy = (pos > hardest).astype(q.dtype).mean()
        negative = (query @ negatives.mean(axis=0)).mean()
        watched = (accuracy, pos.mean() * temperature, negative)
        ctx.mark_non_differentiable(*watched)
        return (loss, *watched)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_query,) = ctx.saved_tensor()
        return grad_loss * grad_query, None, None


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
    dtype = "float64" if query.dtype == paddle.float64 else "float32"
    query, positive, negatives = (t.astype(dtype) for t in (query, positive.detach(), negatives.detach()))
    with paddle.amp.auto_cast(enable=False):  # sums over a queue need float32
        out = _InfoNCE.apply(query, positive, negatives, float(temperature), bool(watch))
    if not watch:
        return out, {}
    return out[0], dict(zip(("accuracy", "positive", "negative"), out[1:]))


def info_nce_plain(query, positive, negatives, temperature):
    """The same loss from the [M, 1 + K] logits, with autograd's gradient; memory grows with M·K. Returns a 0-d tensor.

    Not through `F.cross_entropy`: on the CPU Paddle's clips log-probabilities at −64, which a small τ reaches.
    """
    pos = (query * positive).sum(axis=1, keepdim=True)
    logits = paddle.concat([pos, paddle.matmul(query, negatives, transpose_y=True)], axis=1) / temperature
    return (paddle.logsumexp(logits, axis=1) - logits[:, 0]).mean()
