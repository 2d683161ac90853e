"""One training step, ResNet-50, 224 px, queues of 65536: python benchmarks/step.py [--batches 8 32] [--rounds 4]

Ours in one process, ours in one process per core (each with its share of the batch; the gradients are averaged), the same step as
Paddle code has it usually (all logits side by side, the key encoder updated tensor by tensor), and the authors' in PyTorch. From
the batch in memory to the updated weights and queues; the picture tables of `data.py` are apart from this.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from functools import partial

import measure
import numpy as np

from ppdensecl.machine import cores

SIZE, QUEUE, DIM, TEMPERATURE, MOMENTUM = 224, 65536, 128, 0.2, 0.999
CORES = cores()


def ours(batch, recompute=0):
    import ppdensecl  # noqa: F401 (imports Pillow before paddle)
    import paddle

    from ppdensecl import parallel
    from ppdensecl.config import OptimConfig
    from ppdensecl.engine import device
    from ppdensecl.engine.optimisation import build_optimizer
    from ppdensecl.models import DenseCL

    device.select("cpu")
    parallel.start()
    paddle.seed(0)
    model = DenseCL("resnet50", queue_len=QUEUE)
    model.encoder_q.backbone.recompute = recompute
    wrapped, optimizer = parallel.wrap(model, build_optimizer(OptimConfig(), model))
    views = np.random.default_rng(parallel.rank()).integers(0, 256, (2, batch // parallel.world_size(), SIZE, SIZE, 3), np.uint8)

    def once():
        model.update_key_encoder()
        output = wrapped(*map(paddle.to_tensor, views))
        output.loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        model.enqueue(output)
        return {"loss": float(output.loss)}
    return once


def ours_on_all_cores(batch, together=True):
    """A process per core; a turn is one of all of them, and its memory their sum. Not together, they exchange nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    addresses = [f"127.0.0.1:{port + 1 + rank}" for rank in range(CORES)]
    group = {"PADDLE_TRAINERS_NUM": str(CORES), "PADDLE_LOCAL_SIZE": str(CORES), "PADDLE_MASTER": f"127.0.0.1:{port}",
             "PADDLE_TRAINER_ENDPOINTS": ",".join(addresses), "PADDLE_DISTRI_BACKEND": "gloo"}  # as Paddle's launcher sets them
    ranks = [subprocess.Popen(
        [sys.executable, __file__, "--way", "ours", "--batches", str(batch if together else batch // CORES)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PPDENSECL_CPU_THREADS": "1", **({**group, "PADDLE_TRAINER_ID": str(rank),
             "PADDLE_CURRENT_ENDPOINT": addresses[rank]} if together else {})}) for rank in range(CORES)]

    def once():
        for rank in ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        answers = [json.loads(rank.stdout.readline()) for rank in ranks]
        return {key: sum(answer[key] for answer in answers) for key in ("cpu", "before", "peak")}
    return once


def usual_paddle(batch):
    """As Paddle ports have it: float batches, logits side by side, a loop over the encoder's tensors, queues of [D, K]."""
    import paddle
    import paddle.nn.functional as F
    from paddle import nn
    from paddle.vision.models import resnet50

    class Encoder(nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = resnet50(num_classes=0, with_pool=False)
            self.mlp = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, DIM))
            self.mlp2 = nn.Sequential(nn.Conv2D(2048, 2048, 1), nn.ReLU(), nn.Conv2D(2048, DIM, 1))

        def forward(self, x):
            features = self.backbone(x)
            dense = self.mlp2(features)
            parts = self.mlp(features.mean([2, 3])), dense.flatten(2), dense.mean([2, 3]), features.flatten(2)
            return [F.normalize(part, axis=1) for part in parts]

    query_encoder, key_encoder = Encoder(), Encoder()
    for q, k in zip(query_encoder.parameters(), key_encoder.parameters()):
        k.set_value(q)
        k.stop_gradient = True
    queues = [F.normalize(paddle.randn([DIM, QUEUE]), axis=0) for _ in range(2)]
    pointer = paddle.zeros([1], "int64")
    optimizer = paddle.optimizer.Momentum(0.03, 0.9, query_encoder.parameters(), weight_decay=1e-4)
    views = [paddle.randn([batch, 3, SIZE, SIZE]) for _ in range(2)]

    def info_nce(query, positive, queue):
        own = paddle.einsum("nc,nc->n", query, positive).unsqueeze(-1)
        logits = paddle.concat([own, paddle.einsum("nc,ck->nk", query, queue.clone().detach())], axis=1) / TEMPERATURE
        return F.cross_entropy(logits, paddle.zeros([len(query)], "int64"))

    def once():
        q, dense_q, _, features_q = query_encoder(views[0])
        with paddle.no_grad():
            for a, b in zip(query_encoder.parameters(), key_encoder.parameters()):
                paddle.assign(b * MOMENTUM + a * (1.0 - MOMENTUM), b)
                b.stop_gradient = True
            k, dense_k, pooled_k, features_k = key_encoder(views[1])
            match = paddle.matmul(features_q.transpose([0, 2, 1]), features_k).argmax(axis=2)
            positive = paddle.take_along_axis(dense_k, match.unsqueeze(1).expand([-1, DIM, -1]), 2)
        rows = [x.transpose([0, 2, 1]).reshape([-1, DIM]) for x in (dense_q, positive)]
        loss = 0.5 * info_nce(q, k, queues[0]) + 0.5 * info_nce(*rows, queues[1])
        with paddle.no_grad():
            start = int(pointer[0])
            for queue, keys in zip(queues, (k, pooled_k)):
                queue[:, start:start + batch] = keys.transpose([1, 0])
            pointer[0] = (start + batch) % QUEUE
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return {"loss": float(loss)}
    return once


def pytorch(batch):
    sys.path.insert(0, str(measure.ROOT / "tools/align"))
    import reference
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(CORES)
    encoders = [torch.nn.Sequential(reference.ResNet(50), reference.Head(2048, 2048, DIM, None)) for _ in range(2)]
    encoders[1].requires_grad_(False)
    queues = [F.normalize(torch.randn(DIM, QUEUE), dim=0) for _ in range(2)]
    pointer = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(encoders[0].parameters(), 0.03, 0.9, weight_decay=1e-4)
    views = [torch.randn(batch, 3, SIZE, SIZE) for _ in range(2)]

    def encode(encoder, x):
        features = encoder[0](x)[-1]
        return [F.normalize(part, dim=1) for part in (*encoder[1](features), features.flatten(2))]

    def info_nce(query, positive, queue):
        own = torch.einsum("nc,nc->n", [query, positive]).unsqueeze(-1)
        logits = torch.cat([own, torch.einsum("nc,ck->nk", [query, queue.clone().detach()])], 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    def once():
        q, dense_q, _, features_q = encode(encoders[0], views[0])
        with torch.no_grad():
            for a, b in zip(encoders[0].parameters(), encoders[1].parameters()):
                b.data = b.data * MOMENTUM + a.data * (1.0 - MOMENTUM)
            k, dense_k, pooled_k, features_k = encode(encoders[1], views[1])
            match = torch.matmul(features_q.permute(0, 2, 1), features_k).max(2).indices
            positive = torch.gather(dense_k, 2, match.unsqueeze(1).expand(-1, DIM, -1))
        rows = [x.permute(0, 2, 1).reshape(-1, DIM) for x in (dense_q, positive)]
        loss = 0.5 * info_nce(q, k, queues[0]) + 0.5 * info_nce(*rows, queues[1])
        with torch.no_grad():
            start = int(pointer)
            for queue, keys in zip(queues, (k, pooled_k)):
                queue[:, start:start + batch] = keys.T
            pointer[0] = (start + batch) % QUEUE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": float(loss)}
    return once


KEEP = str(2**33)  # bytes: malloc gives nothing back, as `ppdensecl.machine` has it for ours
WAYS = {  # name: (function of the batch, environment)
    "ours": (ours, {}),
    "ours, recompute=1": (partial(ours, recompute=1), {}),
    "ours, a process per core": (ours_on_all_cores, {}),
    "usual Paddle, as it comes": (usual_paddle, {}),  # Paddle then takes one thread
    "usual Paddle": (usual_paddle, {"OMP_NUM_THREADS": str(CORES), "MKL_DEBUG_CPU_TYPE": "5"}),
    "PyTorch": (pytorch, {}),
    "PyTorch, malloc keeps": (pytorch, {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP}),
    "one process, one thread": (ours, {"PPDENSECL_CPU_THREADS": "1"}),
    "processes that exchange nothing": (partial(ours_on_all_cores, together=False), {}),
}
PEERS = ("PyTorch", "usual Paddle", "usual Paddle, as it comes")


def measured(names, batch, rounds):
    """{way: its answers}."""
    return measure.in_turn({name: ([sys.executable, __file__, "--way", name, "--batches", batch], WAYS[name][1]) for name in names},
                           rounds, together=batch <= 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=measure.RESULTS)
    arguments = parser.parse_args()
    if arguments.way:
        return measure.serve(WAYS[arguments.way][0](*arguments.batches))
    names, rows, found = list(WAYS)[:-2], [], {}
    for batch in arguments.batches:
        found[batch] = answers = measured(names, batch, arguments.rounds)
        seconds = {name: measure.median(turns) for name, turns in answers.items()}
        peak = {name: max(turn["peak"] for turn in turns) for name, turns in answers.items()}
        rows += [[batch, name, seconds[name], *(seconds[name] / seconds[peer] for peer in PEERS), f"{peak[name]:.0f}",
                  *(peak[name] / peak[peer] for peer in PEERS[:2])] for name in names]
    markdown = measure.table(["batch", "step", "seconds", *(f"/ {peer}" for peer in PEERS), "peak MiB",
                              *(f"/ {peer}" for peer in PEERS[:2])], rows)

    def plot(figure):
        for number, (title, column) in enumerate((("seconds a step", 2), ("peak memory, MiB", 6)), 1):
            axes = figure.add_subplot(1, 2, number)
            for name in names:
                points = [(row[0], float(row[column])) for row in rows if row[1] == name]
                axes.plot(*zip(*points), "o-", label=name)
            axes.set(xlabel="pictures a step", ylabel=title, xticks=arguments.batches, ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right")

    measure.write("step", {"rounds": arguments.rounds, "answers": found}, markdown, plot, arguments.folder)


if __name__ == "__main__":
    main()
