"""The loss, forward and backward, against its textbook form in Paddle and in PyTorch and against its two matrix products alone.

python benchmarks/loss.py: the dense and the global loss of 32 pictures (1568 and 32 queries) with 65536 negatives, and how
time and memory grow with both. Writes docs/benchmarks/loss.{json,md,png}.
"""

import argparse
import ctypes
import sys

import measure
from measure import median

N, GRID, K, D, TEMPERATURE = 32, 7, 65536, 128, 0.2
M = N * GRID * GRID
NEGATIVES, QUERIES = (4096, 16384, 65536, 262144), (392, 784, 1568, 3136)
ROOM = 4096  # MiB: a textbook form that needs more is left out
ROUNDS, GROWTH_ROUNDS = 7, 3
WAYS = {"ours": "ours", "naive": "textbook form, Paddle", "torch": "textbook form, PyTorch",
        "products": "two products alone, Paddle", "exp": "two products and exp alone, Paddle"}


def paddle_way(name, rows, keys):
    import paddle
    import paddle.nn.functional as F

    from ppdensecl.engine import device
    from ppdensecl.losses import info_nce
    from ppdensecl.losses.info_nce import LOGITS, MIN_CHUNK

    device.select("cpu")

    def unit(n):
        return F.normalize(paddle.randn([n, D]))

    def naive(query, positive, queue):
        same = (query * positive).sum(axis=1, keepdim=True)
        logits = paddle.concat([same, paddle.matmul(query, queue, transpose_y=True)], axis=1)
        return F.cross_entropy(logits / TEMPERATURE, paddle.zeros([len(query)], "int64"))

    @paddle.no_grad()
    def products(query, queue):
        chunk = max(LOGITS["cpu"] // len(query), MIN_CHUNK)  # as ours
        for start in range(0, keys, chunk):
            part = queue[start:start + chunk]
            logits = paddle.matmul(query, part, transpose_y=True)
            paddle.matmul(logits.exp_() if name == "exp" else logits, part)
            del logits

    inputs = [(unit(m), unit(m), unit(keys)) for m in rows]

    def once():
        for query, positive, queue in inputs:
            if name in ("products", "exp"):
                products(query, queue)
                continue
            query.stop_gradient = False
            loss = naive(query, positive, queue) if name == "naive" else info_nce(query, positive, queue, TEMPERATURE)[0]
            loss.backward()
            query.clear_grad()
            del loss

    return once


def torch_way(rows, keys):
    import torch
    import torch.nn.functional as F

    from ppdensecl.engine import device

    torch.set_num_threads(device.threads())
    inputs = [(F.normalize(torch.randn(m, D)).requires_grad_(), F.normalize(torch.randn(m, D)),
               F.normalize(torch.randn(D, keys), dim=0)) for m in rows]

    def once():
        for query, positive, queue in inputs:
            logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue], 1)
            F.cross_entropy(logits / TEMPERATURE, torch.zeros(len(query), dtype=torch.long)).backward()
            query.grad = None

    return once


def child(name, rows, keys):
    work = torch_way(rows, keys) if name == "torch" else paddle_way(name, rows, keys)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def once():
        work()
        trim(0)  # what malloc keeps would hide in the memory before the next round

    measure.serve(once)


def command(name, rows, keys):
    return [sys.executable, __file__, "--way", name, "--rows", *rows, "--keys", keys], {}


def fit(xs, ys):
    """Straight line through the points with the least relative error: (intercept, slope, worst relative residual)."""
    import numpy as np

    xs, ys = np.array(xs, float), np.array(ys, float)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / ys, xs / ys], 1), np.ones_like(ys), rcond=None)
    return float(a), float(b), float(np.abs((a + b * xs) / ys - 1).max())


def growth(points):
    """{name: [[M, K, seconds, MiB]]} of the points (M, K), where the textbook form fits."""
    needs = {point: 5 * 4 * point[0] * point[1] / 2**20 for point in points}  # logits, their like in autograd, their gradients
    ways = {(name, *point): command(name, point[:1], point[1]) for name in ("ours", "naive") for point in points
            if name == "ours" or needs[point] <= ROOM}
    found = measure.in_turn(ways, GROWTH_ROUNDS)
    curves = {"ours": [], "naive": []}
    for (name, m, k), answers in found.items():
        curves[name].append([m, k, median(answers), median(answers, "extra")])
    return curves


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--rows", type=int, nargs="+", default=[M, N])
    parser.add_argument("--keys", type=int, default=K)
    args = parser.parse_args()
    if args.way:
        return child(args.way, args.rows, args.keys)

    found = measure.in_turn({name: command(name, args.rows, args.keys) for name in WAYS}, ROUNDS)
    over_keys = growth([(M, k) for k in NEGATIVES])
    over_rows = growth([(m, K) for m in QUERIES])
    seconds = {name: median(answers) for name, answers in found.items()}
    extra = {name: median(answers, "extra") for name, answers in found.items()}

    rows = [(title, 1e3 * seconds[name], seconds["ours"] / seconds[name], 1e3 * median(found[name], "cpu"), extra[name],
             extra["ours"] / extra[name]) for name, title in WAYS.items()]
    slope = {name: fit([p[1] for p in points], [p[3] for p in points])[1] for name, points in over_keys.items()}
    goals = [("time / textbook form in Paddle", 1 / 3, seconds["ours"] / seconds["naive"]),
             ("time / textbook form in PyTorch", 1 / 2, seconds["ours"] / seconds["torch"]),
             ("time / its two products", 1.3, seconds["ours"] / seconds["products"]),
             ("memory / textbook form in Paddle", 1 / 20, extra["ours"] / extra["naive"]),
             ("memory / textbook form in PyTorch", 1 / 20, extra["ours"] / extra["torch"]),
             ("growth of the memory with K / textbook form in Paddle", 1 / 100, slope["ours"] / slope["naive"])]
    curves, fits = [], {}
    for axis, found_curves in (("K", over_keys), ("M", over_rows)):
        for name, points in found_curves.items():
            xs = [p[axis == "K"] for p in points]
            for what, unit, ys in (("time", "ms", [1e3 * p[2] for p in points]), ("memory", "MiB", [p[3] for p in points])):
                a, b, worst = fits[f"{name}, {what} over {axis}"] = fit(xs, ys)
                curves.append((f"{WAYS[name]}: {what} over {axis}, {unit}", ", ".join(f"{x}: {y:.4g}" for x, y in zip(xs, ys)),
                               f"{a:.3g} + {1000 * b:.3g} · {axis}/1000", f"{100 * worst:.0f} %"))
    markdown = "\n\n".join([
        f"Dense and global loss of {N} pictures, forward and backward: {M} and {N} queries, K = {K}, D = {D}, "
        f"τ = {TEMPERATURE}, float32. Medians of {ROUNDS} rounds in alternation; extra memory is the peak over what the process had.",
        measure.table(["way", "ms", "ours / it", "CPU ms", "extra MiB", "ours / it"], rows),
        measure.table(["goal", "at most", "found", ""], [(*goal, "met" if goal[2] <= goal[1] else "missed") for goal in goals]),
        "Between the products stands exp, which Paddle computes in one thread on the CPU, while the products use all: an idle second core helps them only, so the ratio to them is greatest on an idle machine.",
        f"Growth, one loss alone (M = {M} over K, K = {K} over M), straight lines of least relative error and their worst "
        f"residual; the textbook form where it fits in {ROOM} MiB:",
        measure.table(["", "measured", "line", "residual"], curves)])

    def plot(figure):
        panels = figure.subplots(1, 2)
        for panel, column, factor, label in ((panels[0], 2, 1e3, "ms"), (panels[1], 3, 1, "extra MiB")):
            for name, marker in (("ours", "o-"), ("naive", "s--")):
                points = over_keys[name]
                panel.plot([p[1] for p in points], [p[column] * factor for p in points], marker, label=WAYS[name])
            panel.set(xscale="log", yscale="log", xlabel=f"negatives K (M = {M} queries)", ylabel=label)
            panel.set_xticks(NEGATIVES, [f"{k}" for k in NEGATIVES])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[0].legend()

    measure.write("loss", {"answers": found, "over_keys": over_keys, "over_rows": over_rows, "fits": fits}, markdown, plot)


if __name__ == "__main__":
    main()
