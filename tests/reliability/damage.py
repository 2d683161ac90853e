"""The newest checkpoint is damaged at a random place: is it seen, is the one before taken, and is that said?

    python tests/reliability/damage.py --times 1000

No training: checkpoints of random arrays. One time in four a file is cut off, else a bit of it is flipped; the three files come
in turn. `latest` is hit as well where it is a hard link to the same file, and is not where the file system copies.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tiny_run import checkpoint

from ppdensecl.errors import UserError


def _make(folder):
    rng = np.random.default_rng(0)
    for iteration in (2, 4, 6):
        weights = {f"layer{i}.weight": rng.standard_normal((16, 8), dtype=np.float32) for i in range(4)}
        velocity = {f"{name}/velocity_0": value for name, value in weights.items()}
        checkpoint.save(folder, f"iter_{iteration}", {**weights, "queue.pointer": np.array(iteration)}, velocity,
                        {"iteration": iteration, "epoch": 0, "config": {"seed": 0}})


def _damage(path, rng):
    data = bytearray(path.read_bytes())
    if rng.random() < 0.25:
        del data[rng.randrange(len(data)):]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _content(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def campaign(times, seed=0, say=print):
    """Returns {what happened: times}; raises AssertionError where a damaged checkpoint was taken or passed over in silence."""
    rng, outcomes = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory(prefix="ppdensecl_damage_") as temporary:
        whole, folder = Path(temporary) / "whole", Path(temporary) / "damaged"
        whole.mkdir()
        _make(whole)
        for number in range(times):
            linked = rng.random() < 0.5
            folder.mkdir()
            for path in whole.iterdir():
                if not linked or path.stem != checkpoint.LATEST:
                    shutil.copy(path, folder)
            for suffix in checkpoint.SUFFIXES if linked else ():
                os.link(folder / f"iter_6{suffix}", folder / f"{checkpoint.LATEST}{suffix}")
            file = folder / f"iter_6{checkpoint.SUFFIXES[number % 3]}"
            before = file.read_bytes()
            _damage(file, rng)
            where = f"trial {number}: {file.name}"
            if file.suffix == ".pdstates" and _content(file) == json.loads(before):
                outcomes["a bit of the JSON that means nothing"] += 1  # the last digit of a time, say
                assert checkpoint.newest(folder)[1]["iteration"] == 6, where
            else:
                path, states, notes = checkpoint.newest(folder)
                assert any(file.name in note and "damaged" in note for note in notes), f"{where}: {notes}"
                assert states["iteration"] == (4 if linked else 6) and path.name == ("iter_4" if linked else "latest"), where
                _same_as(whole / f"iter_{states['iteration']}", path)
                outcomes[f"{file.suffix}: {'the one before' if linked else 'latest, a copy,'} was taken"] += 1
                try:
                    checkpoint.verify(folder / "iter_6")
                    raise AssertionError(f"{where} was taken for whole")
                except UserError as error:
                    assert "damaged" in str(error), where
            shutil.rmtree(folder)
    for outcome, count in sorted(outcomes.items()):
        say(f"{count:5d} {outcome}")
    say(f"{times} places, seed {seed}: every damage was seen and said")
    return outcomes


def _same_as(good, path):
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        a, b = load(good), load(path)
        assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a), path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    try:
        campaign(**vars(parser.parse_args()))
    except AssertionError as error:
        sys.exit(f"FAILED: {error}")


if __name__ == "__main__":
    main()
