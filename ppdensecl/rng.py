"""Counter-based random numbers: every draw is a pure function of what it is for.

Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) turns a key and a counter into random
bits. The key holds the run's seed and the purpose, the counter holds where we are (epoch, sample, view …), so that
nothing depends on the number of workers or processes, on the order of execution or on a resumed run, and no generator
state has to be saved: seed and position ARE the state.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers are drawn for; two purposes never share a stream. The values are part of a run's identity."""

    VIEW = 1  # at: epoch, sample index, view
    ORDER = 2  # at: epoch
    REPLACEMENT = 3  # at: epoch, sample index (a picture that could not be decoded)
    SHUFFLE_BN = 4  # at: step
    RANDOM_MATCH = 5  # at: step, rank
    SYNTHETIC = 6  # at: picture index


def generator(seed: int, purpose: Purpose, *at: int) -> np.random.Generator:
    """A fresh generator for `purpose` at the position `at` (at most three non-negative integers)."""
    if len(at) > 3:
        raise ValueError(f"at most three position numbers, got {at}")
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    # The lowest counter word is the one that Philox itself counts up: it starts at zero.
    counter = np.array([0, *at, *[0] * (3 - len(at))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
