"""The same training steps in Paddle (ours) and in PyTorch (reference.py): same weights, queues, views, permutations.

Both give {"group/name": array} under our names and in our orientation. Paddle's kernels hold their attributes in float32 also
where they compute in float64, and the gradient of Paddle's norm divides by the norm + 1e-12. PyTorch gets the same, so that
what remains is not that: the optimizer's momentum and BatchNorm's are float32(0.9) = 0.89999998, the weight decay
float32(1e-4), BatchNorm's epsilon float32(1e-5). One difference is corrected afterwards (`unbiased`): Paddle's running
variance is that of the batch, PyTorch's is unbiased.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import numpy as np
import paddle
import reference
import torch

from ppdensecl import parallel, rng
from ppdensecl.config import OptimConfig
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import two_views
from ppdensecl.engine import optimisation
from ppdensecl.interop import layouts
from ppdensecl.models import DenseCL

MU, EPSILON = float(np.float32(0.9)), float(np.float32(1e-5))


def _unit(x):
    """x / |x| over axis 1, with Paddle's gradient."""
    norm = x.norm(dim=1, keepdim=True)
    value = norm.detach()
    return x / (value + (norm - value) * (value / (value + 1e-12)))


@dataclass(frozen=True)
class Case:
    """A few training steps; its pictures are procedural scenes, its weights a random start."""

    name: str
    depth: int = 18
    size: int = 128  # of a view, in pixels
    batch: int = 4  # per process
    steps: int = 1
    lr: float = 0.03
    weight_decay: float = 1e-4
    hidden: int = 512
    dim: int = 128
    queue_len: int = 250  # no multiple of any batch: it wraps around
    loss_lambda: float = 0.5
    lambda_warmup_iters: int = 0
    num_grid: Optional[int] = None
    matching: str = "backbone"
    momentum: float = 0.999
    temperature: float = 0.2
    seed: int = 1

    def learning_rate(self, step):
        return 0.5 * self.lr * (1 + math.cos(math.pi * step / self.steps))

    def views(self, rank=0):
        """uint8 [steps, N, 2, H, W, 3] from our own data path."""
        source, augmentation = SyntheticSource(self.batch * 16, self.seed), Augmentation(size=(self.size, self.size))
        indices = [(self.batch * (self.steps * rank + step) + i) for step in range(self.steps) for i in range(self.batch)]
        views = [two_views(source.picture(i % len(source)), augmentation, self.seed, i // len(source), i) for i in indices]
        return np.stack(views).reshape(self.steps, self.batch, 2, self.size, self.size, 3)

    @lru_cache(maxsize=1)
    def state(self):
        """float32 {our name: array}: the random start, roughened, so that nothing is 0 or 1 and key differs from query."""
        draw = np.random.default_rng(self.seed)
        paddle.seed(self.seed)
        state = {}
        for name, value in self.paddle_model(dense=True).state_dict().items():
            value = value.numpy()
            noise = draw.standard_normal(value.shape).astype("float32")
            if name.endswith("_variance"):
                value = 1 + 0.2 * abs(noise)
            elif "bn" in name or "downsample.1" in name or name.endswith("bias"):
                value = value + 0.1 * noise
            elif name.startswith("encoder_k"):
                value = value + 0.1 * value.std() * noise
            state[name] = value
        return state

    def paddle_model(self, dense=False):
        return DenseCL(f"resnet{self.depth}", self.hidden, self.dim, self.num_grid, self.queue_len, self.momentum,
                       self.temperature, self.loss_lambda or (0.5 if dense else 0.0), self.lambda_warmup_iters, self.matching,
                       seed=self.seed)

    def torch_model(self):
        return reference.DenseCL(self.depth, self.hidden, self.dim, self.queue_len, self.num_grid, self.loss_lambda,
                                 self.lambda_warmup_iters, self.matching, self.momentum, self.temperature)


def run_paddle(case, dtype, state, views):
    paddle.set_default_dtype(dtype)
    try:
        return _run_paddle(case, dtype, state, views)
    finally:
        paddle.set_default_dtype("float32")


def _run_paddle(case, dtype, state, views):
    model = case.paddle_model()
    for name, value in model.state_dict().items():
        value.set_value(paddle.to_tensor(state[name], dtype=value.dtype))
    optimizer = optimisation.build_optimizer(OptimConfig(lr=case.lr, weight_decay=case.weight_decay), model)
    wrapped, stepper = parallel.wrap(model, optimizer)
    wrapped.train()
    seen = {}
    if case.steps == 1:
        _watch(model.encoder_q, "q", seen)
        _watch(model.encoder_k, "k", seen)
    found, over_time = {}, {}
    for step in range(case.steps):
        optimizer.set_lr(case.learning_rate(step))
        model.update_key_encoder()
        out = wrapped(paddle.to_tensor(views[step][:, 0]), paddle.to_tensor(views[step][:, 1]), step=step, watch=True)
        out.loss.backward()
        if step == 0:
            found.update({f"backward/{name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
        stepper.step()
        stepper.clear_grad()
        model.enqueue(out)
        values = {"loss/loss": out.loss, "loss/loss_global": out.loss_global,
                  **{f"metric/{name}": value for name, value in out.watched.items() if name.endswith("accuracy")},
                  "queue/queue.keys": model.queue.keys, "queue/queue.pointer": model.queue.pointer}
        if model.dense:
            values.update({"loss/loss_dense": out.loss_dense,
                           "matches/matches": out.matches, "queue/queue_dense.keys": model.queue_dense.keys,
                           "queue/queue_dense.pointer": model.queue_dense.pointer})
        for name, value in values.items():
            over_time.setdefault(name, []).append(value.numpy().copy())
    found.update({name: np.stack(value) for name, value in over_time.items()})
    found.update({_seen(name): value for name, value in seen.items()})
    found.update({_after(name): value.numpy() for name, value in model.state_dict().items() if "queue" not in name})
    return found


def _watch(encoder, prefix, seen):
    """Keeps the normalised views, the maps of the stages, the head's outputs and the encoder's, as they pass by."""
    names = ("global", "dense", "dense_pooled", "features")

    def keep(name):
        return lambda layer, inputs, output: seen.update({f"{prefix}_{name}": output.numpy()})

    def keep_all(suffix):
        return lambda layer, inputs, outputs: seen.update(
            {f"{prefix}_{name}{suffix}": _positions_last(value.numpy(), suffix)
             for name, value in zip(names, outputs) if value is not None})

    for number in (1, 2, 3, 4):
        getattr(encoder.backbone, f"layer{number}").register_forward_post_hook(keep(f"stage{number}"))
    encoder.register_forward_pre_hook(lambda layer, inputs: seen.update({f"{prefix}_view": inputs[0].numpy()}))
    encoder.head.register_forward_post_hook(keep_all("_raw"))
    encoder.register_forward_post_hook(keep_all(""))


def _positions_last(x, suffix):
    """Dense outputs as [N, D, P]: before normalisation ours are [N, D, S, S], after it [N, P, D]."""
    if x.ndim == 4:
        return x.reshape(*x.shape[:2], -1)
    return x.transpose(0, 2, 1) if x.ndim == 3 and not suffix else x


def run_torch(case, dtype, state, views, noise_seed=None):
    """With `noise_seed` every weight is moved by up to one unit in its last place: what comes out differs by rounding noise."""
    model = case.torch_model().to(getattr(torch, dtype))
    start = layouts.to_torch(state)
    if noise_seed is not None:
        draw, eps = np.random.default_rng(noise_seed), np.finfo(dtype).eps
        start = {name: value.astype(dtype) * (1 + eps * draw.integers(-1, 2, value.shape)) if value.dtype.kind == "f" else value
                 for name, value in start.items()}
    missing, unexpected = model.load_state_dict({name: torch.tensor(value) for name, value in start.items()}, strict=False)
    if unexpected or [name for name in missing if "num_batches_tracked" not in name]:
        raise AssertionError(f"the reference has other names: {missing} {unexpected}")
    model.unit = _unit
    sizes = {}  # name of a BatchNorm → values per channel and batch
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.eps = 1 - MU, EPSILON
            module.register_forward_hook(
                lambda _, inputs, output, name=name: sizes.update({name: output.numel() // output.shape[1]}))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, case.lr, momentum=MU, weight_decay=float(np.float32(case.weight_decay)))
    model.train()
    wrapped = model
    if torch.distributed.is_initialized():
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    rows = case.batch * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    found, over_time = {}, {}
    for step in range(case.steps):
        optimizer.param_groups[0]["lr"] = case.learning_rate(step)
        permutation = torch.tensor(rng.generator(case.seed, rng.Purpose.SHUFFLE_BN, step).permutation(rows))
        out = wrapped(torch.tensor(views[step][:, 0]), torch.tensor(views[step][:, 1]), step, permutation)
        optimizer.zero_grad()
        out["loss"].backward()
        if step == 0:
            grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
            found.update({f"backward/{name}": value for name, value in layouts.from_torch(grads).items()})
        optimizer.step()
        now = layouts.from_torch({name: value.numpy().copy() for name, value in model.state_dict().items()
                                  if name.startswith("queue")})
        values = {**{f"loss/{name}": out[name] for name in ("loss", "loss_global", "loss_dense")},
                  **{f"metric/{name}": out[name] for name in ("accuracy", "dense_accuracy")},
                  "matches/matches": out["matches"], "matches/gap": out["gap"]}
        for name, value in {**{name: value.detach().numpy() for name, value in values.items()},
                            **{f"queue/{name}": value for name, value in now.items()}}.items():
            over_time.setdefault(name, []).append(value)
    found.update({name: np.stack(value) for name, value in over_time.items()})
    if case.steps == 1:
        found.update({_seen(name): value.detach().numpy() for name, value in out.items() if name[:2] in ("q_", "k_")})
    end = {name: value.numpy() for name, value in model.state_dict().items() if not name.startswith("queue")}
    found.update({_after(name): value for name, value in layouts.from_torch(end).items()})
    counts = layouts.from_torch({f"{name}.running_var": np.array(size) for name, size in sizes.items()})
    found.update({f"counts/{name}": value for name, value in counts.items()})
    return found


def _seen(name):
    return f"{'data' if name.endswith('view') else 'forward'}/{name}"


def _after(name):
    return f"{'statistics' if name.endswith(('_mean', '_variance')) else 'weights'}/{name}"


def unbiased(case, ours, theirs):
    """Our running variances as PyTorch's: both are 0.9ᵗ·start + a sum over batches, of which PyTorch's is n/(n−1) times ours."""
    out, state, kept = dict(ours), case.state(), MU**case.steps
    for key, n in theirs.items():
        name = key[len("counts/"):]
        if key.startswith("counts/") and f"statistics/{name}" in out:
            variance = out[f"statistics/{name}"]
            start = kept * state[name].astype(variance.dtype)
            out[f"statistics/{name}"] = start + (variance - start) * (n / (n - 1.0))
    return out


def eval_features(case, run):
    """Pooled features [N, C] of the first step's query views by the query encoder that a run ended with, in eval mode."""
    model = case.torch_model().double()
    arrays = {name.partition("/")[2]: value for name, value in run.items() if name.startswith(("weights/", "statistics/"))}
    model.load_state_dict({name: torch.tensor(value) for name, value in layouts.to_torch(arrays).items()}, strict=False)
    model.eval()
    with torch.no_grad():
        views = reference.normalise(torch.tensor(case.views()[0][:, 0]), torch.float64)
        return model.encoder_q[0](views)[-1].mean((2, 3)).numpy()
