"""Peak memory and time of a step with and without optim.recompute=4:
python benchmarks/recompute.py [--backbone resnet50] [--size 112] [--batch 32]

Each in processes of its own, in alternation; prints both runs' peaks (with and without what Paddle and the model take before the
first step), the medians of the processes' CPU seconds for a step, and the ratios.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def child(backbone, size, batch, recompute):
    import ppdensecl  # noqa: F401 (imports Pillow before paddle)
    import numpy as np
    import paddle

    from ppdensecl.config import OptimConfig
    from ppdensecl.engine.optimisation import build_optimizer
    from ppdensecl.models import DenseCL

    paddle.set_device("cpu")
    paddle.seed(0)
    model = DenseCL(backbone, queue_len=4096)
    model.encoder_q.backbone.recompute = recompute
    optimizer = build_optimizer(OptimConfig(), model)
    draw, seconds, before = np.random.default_rng(0), [], _peak()
    for step in range(4):
        views = [paddle.to_tensor(draw.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)) for _ in range(2)]
        start = time.process_time()
        model.update_key_encoder()
        out = model(*views, step=step)
        out.loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        model.enqueue(out)
        loss = float(out.loss)
        seconds.append(time.process_time() - start)
    print(before, _peak(), np.median(seconds[1:]), repr(loss))


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--child", choices=["0", "4"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.backbone, arguments.size, arguments.batch, int(arguments.child))
    found = {0: [], 4: []}
    for recompute in (0, 4) * 2:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(recompute)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found[recompute].append([float(x) for x in output[-4:]])
    assert len({losses[3] for runs in found.values() for losses in runs}) == 1, "the losses differ"
    for name, column in (("peak memory, MB", lambda r: r[1]), ("beyond Paddle and the model, MB", lambda r: r[1] - r[0]),
                         ("CPU seconds a step", lambda r: r[2])):
        without, with_it = ([column(run) for run in found[recompute]] for recompute in (0, 4))
        print(f"{arguments.backbone}, {arguments.size} px, batch {arguments.batch}: {name}: "
              f"without {without[0]:.4g} {without[1]:.4g}, with {with_it[0]:.4g} {with_it[1]:.4g}, ratio {sum(with_it) / sum(without):.2f}")


if __name__ == "__main__":
    main()
