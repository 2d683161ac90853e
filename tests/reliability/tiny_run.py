"""The run that the fault campaigns disturb: tools/train.py with a tiny model. And whether two of them ended the same."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]
import ppdensecl  # noqa: E402,F401 (before paddle)
from ppdensecl.engine import checkpoint  # noqa: E402

CONFIG = ["-c", str(ROOT / "configs/densecl_r18_demo.yaml"), "-o", "model.stages=1", "model.hidden_dim=16",
          "model.embedding_dim=8", "model.queue_len=16", "data.image_size=32", "data.batch_size=4",
          "data.synthetic_count=40", "data.workers=1",
          "log.interval=1", "log.visualdl=false", "optim.epochs=1000000"]


def command(folder, *arguments, processes=1, overrides=()):
    """tools/train.py as a user starts it; the launcher's logs go to FOLDER.log."""
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", f"{folder}.log"]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "tools/train.py"), *CONFIG, f"output_dir={folder}",
            *overrides, *arguments]


def start(folder, *arguments, **options):
    """The process, in a session of its own; its output goes to FOLDER.out."""
    with open(f"{folder}.out", "w") as out:
        return subprocess.Popen(command(folder, *arguments, **options), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                env=environment(), start_new_session=True)


def run(*arguments, timeout=600, **options):
    return subprocess.run(command(*arguments, **options), cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=timeout)


def environment():
    return {**os.environ, "PPDENSECL_CPU_THREADS": "1"}


def same(folder, other):
    """Whether the last checkpoints of two runs have the same bits, weights and optimizer."""
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        a, b = load(Path(folder) / "latest"), load(Path(other) / "latest")
        if a.keys() != b.keys() or any(a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes() for name in a):
            return False
    return True


def newest_iteration(folder):
    """Of the checkpoint that --resume would take; 0 where there is none. Raises UserError where none is whole."""
    return checkpoint.newest(folder)[1]["iteration"] if checkpoint.exists(folder) else 0


def logged_iterations(folder):
    """How many iterations train.log has lines of."""
    log = Path(folder) / "train.log"
    return len(re.findall(r"iter: \d+/", log.read_text())) if log.exists() else 0


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened in {seconds} s")
        time.sleep(0.02)


def descendants(pid):
    """Process numbers of the children of `pid`, and of theirs."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [number for child in children for number in (child, *descendants(child))]


def ranks(launcher):
    """Process numbers of the launcher's ranks, in rank order."""
    found = {}
    for pid in descendants(launcher.pid):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        number = re.search(rb"PADDLE_TRAINER_ID=(\d+)", environ)
        if number and parent == launcher.pid:
            found[int(number[1])] = pid
    return [found[number] for number in sorted(found)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def as_command(campaign, parser):
    """Runs a campaign with the arguments of the command line; exit status 1 where what should have held did not."""
    try:
        campaign(**vars(parser.parse_args()), say=lambda text: print(text, flush=True))
    except AssertionError as error:
        sys.exit(f"FAILED: {error}")
