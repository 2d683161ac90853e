"""The comparisons of the model: one step in all detail, 20 steps, what else the method can be, two processes."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import compare
import matplotlib
import numpy as np
import steps
from steps import Case
from two_processes import CASE as TWO

from ppdensecl.errors import UserError

NOISE = (11, 12, 13, 14)  # seeds of the runs that tell what rounding does
WORKER = str(Path(__file__).resolve().parent / "two_processes.py")


def _runs(case, *dtypes):
    """(dtype, ours, ours with unbiased running variances, PyTorch's, its rounding noise) for each dtype."""
    state, views = case.state(), case.views()
    exact = steps.run_torch(case, "float64", state, views)
    for dtype in dtypes:
        theirs = exact if dtype == "float64" else steps.run_torch(case, dtype, state, views)
        others = (steps.run_torch(case, dtype, state, views, seed) for seed in NOISE[:4 if case.steps == 1 else 2])
        noise = compare.noise(theirs, itertools.chain(others, [exact]))
        ours = steps.run_paddle(case, dtype, state, views)
        yield dtype, ours, steps.unbiased(case, ours, theirs), theirs, noise


def one_step(folder):
    """Everything of one step, for the paper's ResNet-50 and for ResNet-18; reprod-log's files are of the latter in float32."""
    found = []
    for case in (Case("one step, resnet18"), Case("one step, resnet50", depth=50, hidden=2048)):
        for dtype, _, ours, theirs, noise in _runs(case, "float32", "float64"):
            found += compare.rows(case.name, dtype, ours, theirs, noise)
            for group in ("data", "forward", "loss", "metric", "backward") if (case.depth, dtype) == (18, "float32") else ():
                found.append(compare.write_pair(folder, case.name, group, dtype, ours, theirs, noise))
    return found


def twenty_steps(folder):
    """In float32 with a hundredth of the learning rate: with the recipe's, rounding noise alone grows until it says nothing
    (PyTorch's float32 leaves its own float64 by more than 1e-3 within a few steps)."""
    found, losses = [], {}
    for dtype, lr in (("float64", 0.03), ("float32", 3e-4)):
        case = Case(f"20 steps, lr {lr:g}", steps=20, lr=lr)
        for dtype, raw, ours, theirs, noise in _runs(case, dtype):
            found += compare.rows(case.name, dtype, ours, theirs, noise)
            found.append(compare.write_pair(folder, case.name, "loss", dtype, ours, theirs, noise, "losses"))
            losses[f"{dtype}, lr {lr:g}"] = ours, theirs, noise
            if dtype == "float64":
                found += _running_variance(case, raw, ours)
    _draw(losses, folder / "trajectory.png")
    return found


def _running_variance(case, ours, corrected):
    """The size of the one known difference, and what it does to the features in eval mode; no check of equality."""
    names = [name for name in ours if name.endswith("_variance")]
    features = [steps.eval_features(case, run) for run in (ours, corrected)]
    biased, unbiased = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in features)
    why = f"a known difference, not a fault: after {case.steps} steps with batches of {case.batch} at {case.size} px"
    rows = {"relative difference of a layer's variances": [np.abs(ours[name] / corrected[name] - 1).max() for name in names],
            "1 - cosine of pooled features in eval mode": 1 - (biased * unbiased).sum(1)}
    return [compare.row(case.name, f"running variance/{name}", "float64", values, np.zeros(len(values)), np.inf, why=why)
            for name, values in rows.items()]


def variants(folder):
    """Three steps of what else the method can be, in float64."""
    found = []
    for name, options in {"MoCo-v2 (λ = 0)": dict(loss_lambda=0.0), "λ = 1": dict(loss_lambda=1.0),
                          "λ warmed up": dict(lambda_warmup_iters=2), "grid 2": dict(num_grid=2), "grid 5": dict(num_grid=5),
                          "matching by embedding": dict(matching="embedding")}.items():
        case = Case(f"3 steps, {name}", steps=3, size=96, **options)
        for dtype, _, ours, theirs, noise in _runs(case, "float64"):
            found += compare.rows(case.name, dtype, ours, theirs, noise)
    return found


def two_processes(folder):
    """Paddle's fleet and PyTorch's DistributedDataParallel, both over gloo, with the same shuffling of the key's batch."""
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "log")]
    _finish([_start([*launch, WORKER, "paddle", str(folder)])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    _finish([_start([sys.executable, WORKER, "torch", str(folder)], MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2",
                    RANK=str(rank)) for rank in (0, 1)])
    found = []

    def load(name, rank):
        return dict(np.load(folder / f"{name}_{rank}.npz"))

    for dtype in ("float32", "float64"):
        for rank in (0, 1):
            theirs = load(f"torch_{dtype}", rank)
            noise = compare.noise(theirs, [load(f"torch_{dtype}_noise", rank), load("torch_float64", rank)])
            ours = steps.unbiased(TWO, load(f"paddle_{dtype}", rank), theirs)
            found += compare.rows(f"{TWO.name}, rank {rank}", dtype, ours, theirs, noise)
    for file in folder.glob("*_[01].npz"):
        file.unlink()
    return found


def _start(command, **variables):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **variables})


def _finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            for other in processes:
                other.kill()
            raise UserError(f"{WORKER} ended with status {process.returncode}; its last words: {output[-2000:]}")


def _gaps(values):
    return np.where(values > 0, values, np.nan)  # no difference at all has no place on a logarithmic scale


def _draw(losses, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(losses), figsize=(11, 6), sharex=True, constrained_layout=True)
    for column, (title, (ours, theirs, noise)) in zip(axes.T, losses.items()):
        for name, colour in (("loss_global", "tab:blue"), ("loss_dense", "tab:orange")):
            a, b = (run[f"loss/{name}"].astype("float64").ravel() for run in (ours, theirs))
            floor = noise[f"loss/{name}"].ravel()
            column[0].plot(b, color=colour, lw=5, alpha=0.35, label=f"{name}, PyTorch")
            column[0].plot(a, color=colour, lw=1.2, label=f"{name}, ppdensecl")
            column[1].semilogy(_gaps(np.abs(a - b)), color=colour, lw=1.2, marker=".",
                               label=f"|difference| of {name} (none where no dot)")
            column[1].semilogy(_gaps(floor), color=colour, ls=":", label="rounding noise of PyTorch itself")
        column[0].set_title(title)
        column[1].set_xlabel("step")
        column[1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for axis in column:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
