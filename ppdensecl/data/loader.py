"""Batches of view pairs: the same bytes for any number of workers, and workers that never idle.

A worker process makes whole batches into memory it shares with the training process (anonymous, so that nothing is left
behind whatever dies), ahead of need and across the ends of epochs. Views are a pure function of (seed, epoch, sample, view),
so nobody has a state to save.
"""

from __future__ import annotations

import mmap

import numpy as np

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.views import needed, two_views
from ppdensecl.data.worker import AHEAD, Worker, answers
from ppdensecl.errors import UserError
from ppdensecl.rng import Purpose, generator


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
        if workers:  # memory that is shared with them, gone with the last process that has it
            memory = mmap.mmap(-1, AHEAD * workers * int(np.prod(self._shape)))
            self._slots = np.frombuffer(memory, np.uint8).reshape(-1, *self._shape)
        for number in range(workers):
            self._workers.append(Worker(self._fill_slot, f"data worker {number}",
                                        "lower data.workers or data.batch_size, then go on with --resume"))

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
        requests = ((i % len(self._slots), batch, self.samples(batch)) for i, batch in enumerate(numbers))
        for slot, bad in answers(self._workers, requests):
            self._report(bad)
            yield self._slots[slot]

    def _fill_slot(self, request):
        slot, batch, samples = request
        return slot, self.fill(self._slots[slot], batch, samples)

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
