"""kill -9 at random moments of a run that saves every other iteration; each time it goes on with --resume.

    python tests/reliability/kill.py --times 100                   # the training process
    python tests/reliability/kill.py --times 15 --processes 2      # a random rank of two

A run is killed and resumed until it is done, then the next one is begun, until there were as many kills as asked for. Every
resume must take the newest whole checkpoint, never an older one than before, and every run must end with the bits of one that
nobody disturbed. What a kill hit is read from what it left in the folder.
"""

import argparse
import collections
import math
import os
import random
import re
import signal
import tempfile
import time
from pathlib import Path

from tiny_run import (
    alive, as_command, checkpoint, descendants, logged_iterations, newest_iteration, ranks, same, start, wait_until)

STARTING, WRITING, BETWEEN, PRUNING, COMPUTING = (
    "before its first iteration", "while a file was written", "between the files of a checkpoint", "while an old one was deleted",
    "elsewhere")


def hit(folder, started):
    """Which of the moments above a kill was at."""
    if any(folder.glob(".*.tmp*")):
        return WRITING
    states = {path.stem for path in folder.glob("*.pdstates")} - {checkpoint.LATEST}
    parts = {path.stem for suffix in checkpoint.SUFFIXES[:2] for path in folder.glob(f"*{suffix}")} - {checkpoint.LATEST}
    saved = max((int(re.search(r"\d+", name)[0]) for name in states), default=0)
    lone = [int(re.search(r"\d+", name)[0]) for name in parts - states]
    if any(number > saved for number in lone):
        return BETWEEN
    if lone:
        return PRUNING
    if states:  # `latest` is made of links to the newest
        latest = [folder / (checkpoint.LATEST + suffix) for suffix in checkpoint.SUFFIXES]
        if not all(path.exists() and path.samefile(folder / f"iter_{saved}{path.suffix}") for path in latest):
            return BETWEEN
    return COMPUTING if started else STARTING


def campaign(times, processes=1, seed=0, iterations=200, say=print):
    """Returns {moment: kills}; raises AssertionError where a run did not go on as it should."""
    rng = random.Random(seed)
    options = {"processes": processes, "overrides": (f"optim.max_iters={iterations}", "save.interval_epochs=1000000",
                                                     "save.interval_iters=2", "save.keep_last=2")}
    moments, names, ends, restarts, runs, kills = collections.Counter(), collections.Counter(), [], [], 0, 0
    with tempfile.TemporaryDirectory(prefix="ppdensecl_kill_") as temporary:
        whole = Path(temporary) / "undisturbed"
        begun, process = time.monotonic(), start(whole, **options)
        wait_until(lambda: logged_iterations(whole))
        restarts.append(time.monotonic() - begun)
        assert process.wait() == 0, Path(f"{whole}.out").read_text()
        say(f"undisturbed run of {iterations} iterations: {time.monotonic() - begun:.0f} s")
        while kills < times:
            runs += 1
            folder = Path(temporary) / f"run{runs}"
            before = 0
            while True:
                # One kill in four while it starts or resumes, one as soon as a file is being written, two while it trains.
                aim = rng.choice(("start", "file", "any", "any"))
                at_start, lines, begun = aim == "start", logged_iterations(folder), time.monotonic()
                delay, since = rng.uniform(0, restarts[-1] if at_start else 2.5), begun if at_start else math.inf
                process = start(folder, "--resume", **options)
                first = None
                # Not before all ranks are there: whoever kills the launcher alone leaves its ranks to themselves.
                while process.poll() is None and (kills == times or time.monotonic() < since + delay
                                                  or processes > 1 and len(ranks(process)) < processes):
                    time.sleep(0.005)
                    if first is None and logged_iterations(folder) > lines:
                        first = time.monotonic()
                        restarts.append(first - begun)
                        since = begun if at_start else first
                while aim == "file" and process.poll() is None and not any(folder.glob(".*.tmp*")):
                    pass
                if process.poll() is not None:
                    break
                time.sleep(rng.uniform(0, 0.04) if aim == "file" else 0)
                family = [process.pid, *descendants(process.pid)]
                victims = ranks(process) if processes > 1 else [process.pid]
                victim = rng.randrange(len(victims))
                os.kill(victims[victim], signal.SIGKILL)
                killed = time.monotonic()
                process.wait(120)
                wait_until(lambda: not any(map(alive, family)), 120)
                ends.append(time.monotonic() - killed)
                kills += 1
                named = re.search(r"Container rank (\d+) status failed", Path(f"{folder}.out").read_text())
                if named:
                    names[int(named[1]) == victim] += 1
                moments[hit(folder, logged_iterations(folder) > lines) if folder.exists() else STARTING] += 1
                now = newest_iteration(folder) if folder.exists() else 0
                assert now >= before, f"kill {kills}: the newest whole checkpoint was of iteration {before}, now of {now}"
                before = now
                if kills % 10 == 0:
                    say(f"{kills} kills, run {runs} at iteration {now} of {iterations}")
            log = (folder / "train.log").read_text()
            assert process.returncode == 0, f"run {runs} ended with {process.returncode}: {log[-2000:]}"
            assert same(folder, whole), f"run {runs} is not the undisturbed one"
            left = sorted(path.name for path in folder.iterdir() if path.suffix in checkpoint.SUFFIXES or ".tmp" in path.name)
            assert left == sorted(path.name for path in whole.iterdir() if path.suffix in checkpoint.SUFFIXES), left
            say(f"run {runs} done after {kills} kills in all: the same bits as undisturbed")
    say(f"{kills} kills in {runs} runs, {processes} process(es), seed {seed}: all resumed, all bit-identical, nothing left over")
    for moment in (STARTING, WRITING, BETWEEN, PRUNING, COMPUTING):
        say(f"  {moments[moment]:4d} {moment}")
    say(f"  from the kill until the last process was gone: {sum(ends) / len(ends):.1f} s on average, {max(ends):.1f} s at most")
    if processes > 1:
        say(f"  the launcher named the killed rank {names[True]} times, one that failed because of it {names[False]} times")
    say(f"  from start to the first iteration: {sum(restarts) / len(restarts):.1f} s on average")
    return moments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=200, help="of a run")
    as_command(campaign, parser)


if __name__ == "__main__":
    main()
