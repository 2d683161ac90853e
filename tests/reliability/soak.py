"""A long run of a tiny model through tools/train.py: does anything grow?

    python tests/reliability/soak.py --iterations 6000

Pictures from a folder, two worker processes, log lines, VisualDL and checkpoints, as in any run. With every log line the
memory, file descriptors and threads of the training process and of its workers are read from /proc. After a warm-up a
straight line is fitted to each; the exit status is 1 where one rises by more than it may.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
# What may be gained in 1,000 iterations. Paddle 3.3.1 keeps 112 bytes of each paddle.to_tensor (2.6.2 does not), and an iteration
# has two: 220 KB. A leak of one view of these small pictures a batch would be 3,000.
LIMITS = {"training process, KB": 350, "workers together, KB": 200, "file descriptors": 0.5, "threads": 0.5,
          "/dev/shm entries": 0.5, "/dev/shm KB": 1}


def pictures(folder, count=256):
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i:04d}.jpg"), cv2.resize(small, (64, 48), interpolation=cv2.INTER_CUBIC))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(pid):
    """Private memory in KB (what is shared with the parent or is a file's page is not a leak of this process), threads."""
    text = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("RssAnon", "Threads"))


def sample(pid):
    workers = children(pid)
    memory, threads = status(pid)
    shared = [entry.stat().st_size for entry in os.scandir("/dev/shm")]
    return {"training process, KB": memory, "workers together, KB": sum(status(worker)[0] for worker in workers),
            "file descriptors": sum(len(os.listdir(f"/proc/{p}/fd")) for p in (pid, *workers)),
            "threads": threads + sum(status(worker)[1] for worker in workers), "/dev/shm entries": len(shared),
            "/dev/shm KB": sum(shared) / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument("--warm-up", type=int, default=1500, help="iterations that the fit leaves out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--override", nargs="+", default=[], metavar="KEY=VALUE", help="more of the run's config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ppdensecl_soak_") as folder:
        folder = Path(folder)
        (folder / "pictures").mkdir()
        pictures(folder / "pictures")
        sys.exit(soak(folder, arguments))


def soak(folder, arguments):
    command = [sys.executable, str(ROOT / "tools/train.py"), "-c", str(ROOT / "configs/densecl_r18_demo.yaml"), "-o",
               "data.source=folder", f"data.root={folder / 'pictures'}", f"output_dir={folder / 'run'}", "model.stages=1",
               "model.queue_len=16", "model.hidden_dim=16", "data.image_size=32", "data.batch_size=4",
               f"data.workers={arguments.workers}", "optim.epochs=1000000", f"optim.max_iters={arguments.iterations}",
               "log.interval=20", "save.interval_epochs=1000000", "save.interval_iters=250", *arguments.override]
    started, rows = time.time(), []
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "PPDENSECL_CPU_THREADS": "1"})
    tail = []
    for line in run.stdout:
        tail = [*tail[-19:], line]
        place = re.search(r"epoch: (\d+)/\d+, iter: (\d+)/(\d+)", line)
        if place:
            epoch, iteration, per_epoch = map(int, place.groups())
            iteration += (epoch - 1) * per_epoch
            if iteration < arguments.iterations:  # at the last one the workers are already leaving
                rows.append((iteration, time.time(), sample(run.pid)))
                if iteration % 500 == 0:
                    print(iteration, rows[-1][2], flush=True)
    if run.wait() or not rows or rows[-1][0] <= arguments.warm_up:
        print("".join(tail), f"the run ended with status {run.returncode} after {rows[-1][0] if rows else 0} iterations")
        return 1
    log = (folder / "run/train.log").stat().st_size
    fitted = [row for row in rows if row[0] > arguments.warm_up]
    x = np.array([iteration for iteration, _, _ in fitted]) / 1000
    pace = (fitted[-1][1] - fitted[0][1]) / (fitted[-1][0] - fitted[0][0])
    print(f"\n{arguments.iterations} iterations in {time.time() - started:.0f} s ({1000 * pace:.1f} ms each), "
          f"{len(fitted)} samples after iteration {arguments.warm_up}; train.log {log / 1024:.0f} KB, "
          f"{log / len(rows):.0f} bytes per logged line; kept: {len(list((folder / 'run').glob('*.pdparams')))} checkpoints")
    print("| | first | last | least | most | per 1,000 iterations | may be |\n|---|---|---|---|---|---|---|")
    bad = 0
    for name, limit in LIMITS.items():
        y = np.array([values[name] for _, _, values in fitted])
        slope = np.polyfit(x, y, 1)[0]
        bad |= slope > limit
        print(f"| {name} | {y[0]:.0f} | {y[-1]:.0f} | {y.min():.0f} | {y.max():.0f} | {slope:+.2f} | {limit} |")
    left = [entry.name for entry in os.scandir("/proc") if entry.name.isdigit() and str(folder).encode() in _command(entry)]
    if left:
        print(f"left running: {left}")
    return int(bad or bool(left))


def _command(entry):
    try:
        return Path(entry.path, "cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
