"""Batches of view pairs: the same bytes for any number of workers, and workers that never idle.

A worker process makes whole batches into memory it shares with the training process (anonymous, so that nothing is left
behind whatever dies), two ahead of need and across the ends of epochs. Each has a pipe of its own: no lock that a killed
worker could keep. Views are a pure function of (seed, epoch, sample, view), so nobody has a state to save.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections import deque
from pathlib import Path

import cv2
import numpy as np

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.views import needed, two_views
from ppdensecl.errors import UserError
from ppdensecl.memory import keep_freed_memory
from ppdensecl.rng import Purpose, generator

AHEAD = 2  # batches under way per worker
PATIENCE = 60  # seconds of waiting for one batch between two warnings
LOGGER = logging.getLogger("ppdensecl")


class PairLoader:
    """Endless batches of pairs from a source; batch number g belongs to epoch g // len(loader).

    Args:
        source: pictures, see `sources.py`.
        augmentation: `transforms.Augmentation`.
        batch_size: N of this process.
        seed: of order and views.
        workers: processes; 0 loads where it is called.
        rank, world_size: this process takes the rank-th part of every global batch of N · world_size pictures. The global
            order depends on the seed and the epoch alone; the pictures that fill no whole batch wait for another epoch.
        max_bad_fraction: of the source's pictures that may be undecodable before the run ends.
        on_bad: called with (name, reason, how many so far) for each undecodable picture met for the first time.
    """

    def __init__(self, source, augmentation, batch_size, seed=0, workers=0, rank=0, world_size=1, max_bad_fraction=0.01,
                 on_bad=None):
        self.source, self.augmentation, self.seed = source, augmentation, seed
        self.batch_size, self.rank = batch_size, rank
        self.global_batch = batch_size * world_size
        if len(source) < self.global_batch:
            raise UserError(f"'data.batch_size' asks for {self.global_batch} pictures in a batch, but the data has only "
                            f"{len(source)}; use a smaller data.batch_size or more pictures")
        self.allowed_bad = max_bad_fraction * len(source)
        self.on_bad = on_bad or (lambda *_: None)
        self.bad = {}
        self._shape = (2, batch_size, *augmentation.size, 3)
        self._order = (None, None)  # of the epoch asked for last
        self._workers = []
        for number in range(workers):
            self._workers.append(_Worker(self, number))

    def __len__(self):
        """Batches in an epoch."""
        return len(self.source) // self.global_batch

    def samples(self, batch):
        """This process's sample numbers of a batch (counted over all epochs): int64 [N]."""
        epoch, position = divmod(batch, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.source)))
        start = position * self.global_batch + self.rank * self.batch_size
        return self._order[1][start:start + self.batch_size]

    def batches(self, numbers):
        """Yields uint8 [2, N, h, w, 3] RGB for each batch number: [0] the query's views, [1] the key's.

        With workers an array is valid until the next one is asked for. Raises UserError for too many bad pictures and
        for a worker that died.
        """
        if not self._workers:
            out = np.empty(self._shape, np.uint8)
            for batch in numbers:
                self._report(self.fill(out, batch, self.samples(batch)))
                yield out
            return
        for worker in self._workers:
            worker.drain()
        under_way = deque()
        for batch in numbers:
            worker = self._workers[(under_way[-1].number + 1) % len(self._workers) if under_way else 0]
            worker.ask(batch, self.samples(batch))
            under_way.append(worker)
            if len(under_way) == AHEAD * len(self._workers):
                yield self._take(under_way[0])
                under_way.popleft()
        while under_way:
            yield self._take(under_way[0])
            under_way.popleft()

    def _take(self, worker):
        views, bad = worker.take()
        self._report(bad)
        return views

    def fill(self, out, batch, samples):
        """Makes a batch in `out` [2, N, h, w, 3]; returns [(sample, name, reason)] of the pictures that were replaced."""
        epoch, bad = batch // len(self), []
        for row, sample in enumerate(samples):
            picture, full = self._picture(epoch, int(sample), bad)
            two_views(picture, self.augmentation, self.seed, epoch, int(sample), out=out[:, row], full=full)
        return bad

    def _picture(self, epoch, sample, bad):
        """(as many pixels of the sample's picture, or of a substitute, as its views need; (height, width) of the whole)."""
        full = None

        def fewest(*size):
            nonlocal full
            full = size
            return needed(self.augmentation, *size, self.seed, epoch, sample)

        substitutes = None
        index = sample
        while True:
            try:
                picture = self.source.picture(index, fewest)
                return picture, full or picture.shape[:2]
            except UndecodableError as error:
                bad.append((index, error.name, error.reason))
                full = None
            if len(bad) > self.allowed_bad + 100:  # not a picture to be found; `_report` ends the run
                return np.zeros((1, 1, 3), np.uint8), None
            substitutes = substitutes or generator(self.seed, Purpose.REPLACEMENT, epoch, sample)
            index = int(substitutes.integers(len(self.source)))

    def _report(self, bad):
        for sample, name, reason in bad:
            if sample not in self.bad:
                self.bad[sample] = name
                self.on_bad(name, reason, len(self.bad))
        if len(self.bad) > self.allowed_bad:
            names = list(self.bad.values())
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise UserError(f"{len(names)} of {len(self.source)} pictures cannot be decoded, more than "
                            f"data.max_bad_fraction allows: {shown}; repair or remove them, or raise data.max_bad_fraction")

    def close(self):
        """Ends the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One worker process and this side of it."""

    def __init__(self, loader, number):
        self.number = number
        size = int(np.prod(loader._shape))
        memory = mmap.mmap(-1, AHEAD * size)  # shared with the child, gone with the last of the two
        self.slots = np.frombuffer(memory, np.uint8).reshape(AHEAD, *loader._shape)
        self.asked = self.taken = 0
        self.connection, child = multiprocessing.Pipe()
        others = [worker.connection for worker in loader._workers]
        # fork: the source's names are shared, not copied, and nothing is imported again.
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(loader, self.slots, child, [self.connection, *others]), daemon=True)
        self.process.start()
        child.close()

    def ask(self, batch, samples):
        try:
            self.connection.send((batch, self.asked % AHEAD, samples))
        except OSError:
            raise self._death() from None
        self.asked += 1

    def drain(self):
        """Drops what was asked for and never taken."""
        while self.taken < self.asked:
            self.take()

    def take(self):
        """(views, bad) of the earliest batch that was asked for and not taken yet."""
        waited = 0
        while not multiprocessing.connection.wait([self.connection, self.process.sentinel], PATIENCE):
            waited += PATIENCE
            LOGGER.warning(f"data worker {self.number} (process {self.process.pid}) has made no batch for {waited} s "
                           f"({_state(self.process.pid)}); the run waits for it")
        try:
            if not self.connection.poll():
                raise EOFError
            slot, bad, failure = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if failure:
            raise RuntimeError(f"data worker {self.number} failed:\n{failure}")
        self.taken += 1
        return self.slots[slot], bad

    def _death(self):
        self.process.join(5)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return UserError(f"data worker {self.number} (process {self.process.pid}) {how}{hint}; lower data.workers or "
                         "data.batch_size, then go on with --resume")

    def close(self):
        self.connection.close()  # the worker reads the end of its pipe and leaves
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _state(pid):
    """What Linux says a process does."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "in an unknown state"
    return {"T": "stopped; `kill -CONT` lets it go on", "t": "stopped by a debugger", "D": "waiting for the disk or the network",
            "R": "computing"}.get(letter, "sleeping")


def settle():
    """Makes a process good at making views: one thread, and memory that stays."""
    cv2.setNumThreads(0)
    keep_freed_memory()


def _work(loader, slots, connection, inherited):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the training process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:  # else the pipes' ends would stay open when the training process is gone
        other.close()
    settle()
    while True:
        try:
            batch, slot, samples = connection.recv()
        except (EOFError, OSError):
            return
        bad, failure = [], None
        try:
            bad = loader.fill(slots[slot], batch, samples)
        except Exception:
            failure = traceback.format_exc()
        try:
            connection.send((slot, bad, failure))
        except OSError:
            return
