"""The disk fills up while a checkpoint is written; space is made; the run goes on with --resume.

    python tests/reliability/disk_full.py --times 10

Each time a run writes to a small file system of its own (a tmpfs, which needs the right to mount; else, or with --limit, a limit
on the size of a file stands in for it), in which something else leaves room for only a part of the next checkpoint: a random
one, and the second time none at all.
"""

import argparse
import os
import random
import resource
import subprocess
import tempfile
from pathlib import Path

from tiny_run import ROOT, as_command, command, environment, newest_iteration, run, same

OPTIONS = {"overrides": ("optim.max_iters=8", "save.interval_epochs=1000000", "save.interval_iters=2", "save.keep_last=2")}


def _run_limited(folder, size):
    """No file may grow beyond `size` bytes, as if the disk was full then."""
    return subprocess.run(command(folder, "--resume", **OPTIONS), cwd=ROOT, env=environment(), capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def once(mount, whole, rng, say, room=None):
    """mount: a folder that is a small file system, or None: limit the size of files instead. room: bytes that are left."""
    with tempfile.TemporaryDirectory(prefix="ppdensecl_full_", dir=mount) as temporary:
        folder = Path(temporary) / "run"
        result = run(folder, overrides=(*OPTIONS["overrides"], "optim.max_iters=4"))
        assert result.returncode == 0, result.stderr
        largest = max(path.stat().st_size for path in folder.glob("*.pd*"))
        checkpoint_size = sum(path.stat().st_size for path in folder.glob("latest.*"))
        config = (folder / "config.yaml").read_text()
        if mount:
            status = os.statvfs(mount)
            room = rng.randrange(checkpoint_size) if room is None else room
            ballast = Path(temporary) / "ballast"
            ballast.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
            broken = run(folder, "--resume", **OPTIONS)
        else:
            room = rng.randrange(20_000, largest)  # more than train.log, which is written as well
            broken = _run_limited(folder, room)
        log = (folder / "train.log").read_text()
        last = broken.stderr.strip().splitlines()[-1] if broken.stderr.strip() else ""
        assert broken.returncode == 1 and "Traceback" not in broken.stderr + broken.stdout, broken.stderr
        assert "cannot be written" in last and "free some space" in last and "--resume" in last, broken.stderr
        assert newest_iteration(folder) == 4, log
        assert not list(folder.glob(".*.tmp*")), "half a file is left"
        if not room:  # the run could not even note its config
            assert (folder / "config.yaml").read_text() == config
        if mount:
            ballast.unlink()
        result = run(folder, "--resume", **OPTIONS)
        assert result.returncode == 0 and "at iteration 4" in result.stdout, result.stdout + result.stderr
        assert same(folder, whole), "not the bits of the undisturbed run"
        assert not [path.name for path in folder.iterdir() if ".tmp" in path.name or "iter_4" in path.name], "left over"
        say(f"room for {room / 1000:.0f} of {checkpoint_size / 1000:.0f} KB: {last.partition('ERROR: ')[2]}")


def campaign(times, seed=0, limit=False, say=print):
    """Returns the way it was done: "tmpfs" or "limit"."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ppdensecl_full_") as temporary:
        whole, mount = Path(temporary) / "undisturbed", Path(temporary) / "small"
        result = run(whole, **OPTIONS)
        assert result.returncode == 0, result.stderr
        mount.mkdir()
        mounted = not limit and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)],
                                               stderr=subprocess.DEVNULL).returncode == 0
        try:
            for number in range(times):
                once(mount if mounted else None, whole, rng, say, room=0 if mounted and number == 1 else None)
        finally:
            if mounted:
                subprocess.run(["umount", str(mount)], check=True)
        way = "tmpfs" if mounted else "limit"
        say(f"{times} times ({way}), seed {seed}: status 1, one sentence, the old checkpoint whole, and after that bit-identical")
        return way


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", action="store_true", help="limit the size of files, mount nothing")
    as_command(campaign, parser)


if __name__ == "__main__":
    main()
