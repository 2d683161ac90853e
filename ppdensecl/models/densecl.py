"""DenseCL (Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR 2021), and MoCo-v2.

Shapes: N pictures in this process, R processes, C the backbone's width, D the embedding's, P = S·S grid positions (H·W of
the backbone map where no grid is set), K the queues' length.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, Optional

import paddle
import paddle.nn.functional as F
from paddle import nn

from ppdensecl import parallel
from ppdensecl.losses import info_nce
from ppdensecl.models import matching
from ppdensecl.models.heads import DenseProjectionHead
from ppdensecl.models.queue import NegativeQueue
from ppdensecl.models.resnet import ResNet

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB, on a scale of 0 to 1
STD = (0.229, 0.224, 0.225)


class DenseCLOutput(NamedTuple):
    """What one forward pass gives. All numbers are 0-d tensors on the device but `loss_lambda`, a float.

    A tuple, because paddle.DataParallel finds a model's outputs in tensors, tuples, lists and dicts only.
    """

    loss: paddle.Tensor  # (1 − λ) · loss_global + λ · loss_dense
    loss_global: paddle.Tensor
    loss_dense: Optional[paddle.Tensor]  # None for MoCo-v2
    loss_lambda: float  # λ in force at this step
    keys: paddle.Tensor  # [R·N, D] for the queue
    keys_dense: Optional[paddle.Tensor]  # [R·N, D] for the dense queue
    matches: Optional[paddle.Tensor]  # [N, P] int64, the key position of each query position
    watched: dict  # accuracy, mean similarities, matched share; see `DenseCL.forward`


class Encoder(nn.Layer):
    """A backbone and its projection head; all outputs are L2-normalised."""

    def __init__(self, backbone, stages, hidden_dim, embedding_dim, num_grid, dense):
        super().__init__()
        self.backbone = ResNet(int(backbone.removeprefix("resnet")), stages=stages)
        width = self.backbone.feat_channels[-1]
        self.head = DenseProjectionHead(width, hidden_dim or width, embedding_dim, num_grid, dense)

    def forward(self, x):
        """x [N, 3, H0, W0] → global [N, D], dense [N, P, D], dense_pooled [N, D], features [N, P, C] on the same grid.

        Without a dense branch the last three are None.
        """
        features = self.backbone(x)
        outputs = (*self.head(features), self.head.to_grid(features) if self.head.dense else None)
        return tuple(None if y is None else normalised_rows(y) for y in outputs)


def normalised_rows(x):
    """[N, D] or [N, D, S, S] → unit vectors [N, D] or [N, P, D], in float32 even where autocast made them shorter."""
    x = x if x.dtype == paddle.float64 else x.astype("float32")
    if x.ndim == 4:
        x = x.flatten(2).transpose([0, 2, 1])
    with paddle.amp.auto_cast(enable=False):
        return F.normalize(x, axis=-1)


class DenseCL(nn.Layer):
    """One training step is: `update_key_encoder()`, `forward` (any number of times, for gradient accumulation) with
    backward, the optimizer's step, and `enqueue` of the forward passes' keys.

    Args:
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        hidden_dim: of both branches of the head; None for the backbone's width C.
        embedding_dim: D.
        num_grid: S, or None for the backbone's own map.
        queue_len: K; need not be a multiple of the batch.
        momentum: m of the key encoder.
        temperature: τ.
        loss_lambda: λ, the weight of the dense loss. 0 is MoCo-v2: there is no dense branch then.
        lambda_warmup_iters: steps at the start in which the dense loss is computed but weighs nothing.
        matching: "backbone" features (the paper's), dense "embedding"s, or "random" (its Table 6).
        bn_groups: parts of this process's batch that are normalised apart, with the key's pictures shuffled between them: what
            shuffling BN does between processes, for a single one. 1 is the authors' code.
        seed: of shuffling BN and of random matching.
        stages: of the backbone, 1 to 4.
        sync_bn: BatchNorm over the pictures of all processes, on GPUs. It does not replace shuffling BN, which goes on: with
            statistics of the whole batch a query and its key still share them.
    """

    def __init__(self, backbone="resnet50", hidden_dim=None, embedding_dim=128, num_grid=None, queue_len=65536,
                 momentum=0.999, temperature=0.2, loss_lambda=0.5, lambda_warmup_iters=0, matching="backbone", bn_groups=1,
                 seed=0, stages=4, sync_bn=False):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.loss_lambda, self.lambda_warmup_iters = loss_lambda, lambda_warmup_iters
        self.matching, self.bn_groups, self.seed = matching, bn_groups, seed
        self.dense = loss_lambda > 0
        self.autocast = None  # arguments of paddle.amp.auto_cast for the encoders; all else is computed in float32
        self.encoder_q = Encoder(backbone, stages, hidden_dim, embedding_dim, num_grid, self.dense)
        self.encoder_k = Encoder(backbone, stages, hidden_dim, embedding_dim, num_grid, self.dense)
        if sync_bn:
            self.encoder_q, self.encoder_k = map(nn.SyncBatchNorm.convert_sync_batchnorm, (self.encoder_q, self.encoder_k))
        self.queue = NegativeQueue(queue_len, embedding_dim)
        self.queue_dense = NegativeQueue(queue_len, embedding_dim) if self.dense else None
        # Parameters only: a BatchNorm's running statistics are in Paddle's `parameters()` too, but stay each encoder's own.
        self._pairs = [(q, k) for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters())
                       if not q.stop_gradient]
        for q, k in self._pairs:
            paddle.assign(q.detach(), k)
            k.stop_gradient = True

    def lambda_at(self, step):
        """λ in force at this step (0-based, counted in optimizer steps)."""
        return 0.0 if step < self.lambda_warmup_iters else self.loss_lambda

    @paddle.no_grad()
    def update_key_encoder(self):
        """key ← m · key + (1 − m) · query (MoCo, equation 2). Once a step, before its first forward."""
        for q, k in self._pairs:
            k.scale_(self.momentum).add_(q * (1.0 - self.momentum))

    def enqueue(self, output):
        """Puts the keys of a forward pass in the queues. After the step's last forward: a loss never sees its own keys."""
        self.queue.enqueue(output.keys)
        if self.dense:
            self.queue_dense.enqueue(output.keys_dense)

    def _in_groups(self, encoder, x):
        """encoder(x), each of the `bn_groups` parts of the batch with BatchNorm statistics of its own."""
        with paddle.amp.auto_cast(**self.autocast) if self.autocast else contextlib.nullcontext():
            if self.bn_groups == 1:
                return encoder(x)
            parts = list(zip(*(encoder(part) for part in paddle.split(x, self.bn_groups))))
        return tuple(None if part[0] is None else paddle.concat(part) for part in parts)

    def forward(self, view_q, view_k, step=0, watch=False):
        """view_q, view_k: uint8 [N, H0, W0, 3] RGB, or float [N, 3, H0, W0] already normalised. Returns DenseCLOutput.

        With `watch`, `output.watched` has, for the global and the dense branch: `accuracy` (the positive beats all
        negatives), `positive` and `negative` (mean cosine similarity), and `matched_share`, the share of query positions
        matched to their own position.
        """
        shuffle = parallel.Shuffle(len(view_k) * parallel.world_size(), self.bn_groups, self.seed, step)
        with paddle.no_grad():
            # The key first: it leaves nothing behind for a backward pass, and its results travel while the query is encoded.
            k, t, pooled_k, feat_k = self._in_groups(self.encoder_k, normalise(shuffle.scatter(view_k)))
            restored = shuffle.restore((k, pooled_k), (t, feat_k)) if self.dense else shuffle.restore((k,))
        q, r, _, feat_q = self._in_groups(self.encoder_q, normalise(view_q))  # [N, D], [N, P, D], –, [N, P, C]
        with paddle.no_grad():
            if self.dense:  # [R·N, D], [R·N, D], [N, P, D], [N, P, C]
                keys, keys_dense, t, feat_k = restored()
            else:
                (keys,) = restored()
            k = parallel.local(keys)  # [N, D]

        loss_global, watched = info_nce(q, k, self.queue.keys, self.temperature, watch)
        loss_lambda = self.lambda_at(step)
        if not self.dense:
            return DenseCLOutput(loss_global, loss_global, None, loss_lambda, keys, None, None, watched)

        with paddle.no_grad():
            if self.matching == "backbone":
                matches = matching.match(feat_q, feat_k)  # [N, P]
            elif self.matching == "embedding":
                matches = matching.match(r, t)
            else:
                matches = matching.random_match(*r.shape[:2], t.shape[1], self.seed, step)
            t = matching.take(t, matches)  # [N, P, D], the positive of each query position
        d = r.shape[-1]
        loss_dense, dense = info_nce(r.reshape([-1, d]), t.reshape([-1, d]), self.queue_dense.keys, self.temperature, watch)
        loss = (1.0 - loss_lambda) * loss_global + loss_lambda * loss_dense
        if watch:
            own = (matches == paddle.arange(matches.shape[1])).astype("float32").mean()
            watched = {**watched, **{f"dense_{name}": value for name, value in dense.items()}, "matched_share": own}
        return DenseCLOutput(loss, loss_global, loss_dense, loss_lambda, keys, keys_dense, matches, watched)


def normalise(x):
    """uint8 [N, H, W, 3] RGB → float [N, 3, H, W], mean 0 and deviation 1 over ImageNet; float input passes unchanged."""
    if x.dtype != paddle.uint8:
        return x
    # Numbers, not tensors: nothing has to be copied to the device.
    channels = x.astype(paddle.get_default_dtype()).transpose([0, 3, 1, 2]).split(3, axis=1)
    return paddle.concat([(c - 255.0 * m) * (1.0 / (255.0 * s)) for c, m, s in zip(channels, MEAN, STD)], axis=1)
