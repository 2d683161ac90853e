"""What a run tells: log lines on the console and in train.log, a progress bar on a terminal, VisualDL scalars and pictures."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

LOGGER = logging.getLogger("ppdensecl")


class _Console(logging.Handler):
    """Prints above the progress bar, if there is one."""

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def start_logging(folder=None):
    """Sends the log to the console and, if a folder is given, to its train.log (appended). Returns the logger."""
    close_logging()
    formatter = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%Y/%m/%d %H:%M:%S")
    handlers = [_Console()]
    if folder is not None:
        handlers.append(logging.FileHandler(Path(folder) / "train.log", encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(formatter)
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return LOGGER


def close_logging():
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()


class LossSums:
    """Sums of losses on the device, read only when a line is logged: no iteration waits for the device."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, output):
        self.count += 1
        for name in ("loss", "loss_global", "loss_dense"):
            value = getattr(output, name)
            if value is not None:
                value = value.detach()
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self):
        return {name: float(value) / self.count for name, value in self.sums.items()}

    def finite(self):
        return all(np.isfinite(float(value)) for value in self.sums.values())


class Meter:
    """Times of the iterations since the last log line, and the remaining time from all of this run's."""

    def __init__(self):
        self.started = time.perf_counter()
        self.iterations = 0
        self._reset()

    def _reset(self):
        self.since, self.count, self.reader = time.perf_counter(), 0, 0.0

    def waiting(self, batches):
        """The next of `batches`; the time until it is there is the reader's."""
        asked = time.perf_counter()
        batch = next(batches)
        self.reader += time.perf_counter() - asked
        return batch

    @contextlib.contextmanager
    def aside(self):
        """What is done within is no part of an iteration's time."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.since, self.started = self.since + spent, self.started + spent

    def done(self):
        """Call at the end of an iteration."""
        self.count += 1
        self.iterations += 1

    def line(self, samples, remaining):
        """{field: value} since the last call; `samples` pictures per iteration, `remaining` iterations of the run."""
        batch = (time.perf_counter() - self.since) / self.count
        eta = (time.perf_counter() - self.started) / self.iterations * remaining
        fields = {"avg_reader_cost": self.reader / self.count, "avg_batch_cost": batch, "avg_samples": float(samples),
                  "avg_ips": samples / batch, "eta": _clock(eta)}
        self._reset()
        return fields


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def format_line(epoch, epochs, iteration, iterations, lr, values, times):
    """One log line with Paddle's standard fields."""
    numbers = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
    return (f"epoch: {epoch}/{epochs}, iter: {iteration}/{iterations}, lr: {lr:.6f}, {numbers}, "
            f"avg_reader_cost: {times['avg_reader_cost']:.5f} sec, avg_batch_cost: {times['avg_batch_cost']:.5f} sec, "
            f"avg_samples: {times['avg_samples']:.1f}, avg_ips: {times['avg_ips']:.3f} images/sec, eta: {times['eta']}")


class Scalars:
    """VisualDL, imported when it is first wanted; does nothing when switched off."""

    def __init__(self, folder):
        self.writer = None
        if folder is not None:
            from visualdl import LogWriter

            self.writer = LogWriter(logdir=str(folder))

    def add(self, values, step):
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(tag=name, step=step, value=float(value))

    def add_picture(self, tag, picture, step):
        """picture: uint8 [H, W, 3] RGB."""
        if self.writer is not None:
            self.writer.add_image(tag=tag, img=picture, step=step)

    def close(self):
        if self.writer is not None:
            self.writer.close()
