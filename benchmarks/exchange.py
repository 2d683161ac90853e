"""What travels in a step between processes, and how: python -m paddle.distributed.launch --nproc_per_node 2
benchmarks/exchange.py [--batch 32] [--width 2048] [--positions 49]

The key's batch goes out, its keys, dense maps and feature map come back. `one by one` is a gather into a list and a
concatenation for each tensor, as in the authors' code; `Shuffle` is `parallel.Shuffle`. In alternation; prints medians in ms and their ratio.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ppdensecl import parallel  # noqa: E402 (imports Pillow before paddle)
import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402


def one_by_one(shuffle, view, tensors):
    def gather(x):
        parts = []
        dist.all_gather(parts, x)
        return paddle.concat(parts)

    received = paddle.gather(gather(view), shuffle.mine)
    rows = (shuffle.inverse, shuffle.inverse, shuffle.inverse_mine, shuffle.inverse_mine)
    return received, *(paddle.gather(gather(x), index) for x, index in zip(tensors, rows))


def shuffled(shuffle, view, tensors):
    return shuffle.scatter(view), *shuffle.restore(tensors[:2], tensors[2:])()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--positions", type=int, default=49)
    parser.add_argument("--times", type=int, default=15)
    arguments = parser.parse_args()
    parallel.start()
    n, p = arguments.batch, arguments.positions
    view = paddle.to_tensor(np.random.randint(0, 256, (n, 224, 224, 3), dtype=np.uint8))
    tensors = [paddle.randn(shape) for shape in ([n, 128], [n, 128], [n, p, 128], [n, p, arguments.width])]
    shuffle = parallel.Shuffle(n * parallel.world_size(), 1, 0, 0)
    same = [(a == b).all() for a, b in zip(one_by_one(shuffle, view, tensors), shuffled(shuffle, view, tensors))]
    assert all(map(bool, same))
    times = {one_by_one: [], shuffled: []}
    for _ in range(arguments.times):
        for way, found in times.items():
            start = time.perf_counter()
            way(shuffle, view, tensors)[-1].numpy()
            found.append(time.perf_counter() - start)
    if parallel.is_main():
        slow, fast = (1e3 * np.median(found[1:]) for found in times.values())
        size = (view.size + 4 * sum(x.size for x in tensors)) / 1e6
        print(f"{size:.1f} MB per process: one by one {slow:.1f} ms, Shuffle {fast:.1f} ms, ratio {fast / slow:.2f}")


if __name__ == "__main__":
    main()
