"""Peak memory and time of a step by optim.recompute: python benchmarks/recompute.py [--backbone resnet50] [--size 112] [--batch 32]

Each number of stages in a process of its own, in alternation; all must give the same loss, bit for bit.
"""

import argparse
import sys

import measure
import numpy as np

STAGES = (0, 1, 2, 4)


def child(backbone, size, batch, recompute):
    import ppdensecl  # noqa: F401 (imports Pillow before paddle)
    import paddle

    from ppdensecl.config import OptimConfig
    from ppdensecl.engine import device
    from ppdensecl.engine.optimisation import build_optimizer
    from ppdensecl.models import DenseCL

    device.select("cpu")
    paddle.seed(0)
    model = DenseCL(backbone, queue_len=4096)
    model.encoder_q.backbone.recompute = recompute
    optimizer = build_optimizer(OptimConfig(), model)
    draw, start = np.random.default_rng(0), measure.memory("VmRSS")

    def once():
        views = [paddle.to_tensor(draw.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)) for _ in range(2)]
        model.update_key_encoder()
        out = model(*views)
        out.loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        model.enqueue(out)
        return {"loss": repr(float(out.loss)), "start": start}
    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        return measure.serve(child(arguments.backbone, arguments.size, arguments.batch, arguments.way))
    found = measure.in_turn({n: ([sys.executable, __file__, *sys.argv[1:], "--way", n], {}) for n in STAGES}, arguments.rounds)
    assert len({tuple(turn["loss"] for turn in turns) for turns in found.values()}) == 1, "the losses differ"
    columns = {"peak MiB": lambda turns: max(t["peak"] for t in turns),
               "of it beyond Paddle and the model": lambda turns: max(t["peak"] - t["start"] for t in turns),
               "seconds a step": measure.median}
    print(measure.table(["optim.recompute", *(x for name in columns for x in (name, "ratio"))], [
        [str(n), *(x for column in columns.values() for x in (column(found[n]), column(found[n]) / column(found[0])))] for n in STAGES]))
    print(f"\n{arguments.backbone}, {arguments.size} px, batch {arguments.batch}; {measure.machine()}")


if __name__ == "__main__":
    main()
