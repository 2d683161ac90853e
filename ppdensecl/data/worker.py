"""Forked worker processes, each on a pipe of its own: no lock that a killed one could keep."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import multiprocessing.util
import signal
import traceback
import weakref
from collections import deque
from pathlib import Path

import cv2

from ppdensecl.errors import UserError
from ppdensecl.machine import keep_freed_memory

AHEAD = 2  # requests under way per worker
PATIENCE = 60  # seconds of waiting for one answer between two warnings
LOGGER = logging.getLogger("ppdensecl")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ends = weakref.WeakSet()  # of all pipes, those of this process


class Worker:
    """One worker process and this side of it.

    Args:
        answer: request → answer, called in the worker. It may be any function: fork shares what it holds, and nothing is
            pickled or imported again. Requests and answers are pickled.
        name: of the worker in messages.
        advice: what to do if it dies, the end of that sentence.

    `close()` ends the process; so does the end of this object or of the process that made it.
    """

    def __init__(self, answer, name, advice):
        self.name, self.advice, self.pending = name, advice, 0
        self.connection, child = multiprocessing.Pipe()
        _ends.add(self.connection)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=(answer, child), daemon=True)
        # Until it ignores them: Ctrl-C and a batch system's SIGTERM go to all processes, and this one decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child.close()
        # Before Python's own way to end child processes, which is SIGTERM.
        arguments = (self.connection, self.process)
        self.close = multiprocessing.util.Finalize(self, _close, arguments, exitpriority=0)

    def ask(self, request):
        try:
            self.connection.send(request)
        except OSError:
            raise self._death() from None
        self.pending += 1

    def receive(self):
        """The answer to the earliest request that has none yet. Raises UserError if the worker died, RuntimeError with the
        worker's traceback if `answer` raised; warns every PATIENCE seconds that it has to wait."""
        waited = 0
        while not self.connection.poll(PATIENCE):
            waited += PATIENCE
            LOGGER.warning(f"{self.name} (process {self.process.pid}) has made no batch for {waited} s "
                           f"({_state(self.process.pid)}); the run waits for it")
        try:
            answer, failure = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        self.pending -= 1
        if failure:
            raise RuntimeError(f"{self.name} failed:\n{failure}")
        return answer

    def _death(self):
        self.process.join(5)
        code = self.process.exitcode
        killed = f"was killed by signal {-code} and " if code is not None and code < 0 else ""
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return UserError(f"{self.name} (process {self.process.pid}) {killed}ended with status {code}{hint}; {self.advice}")


def answers(workers, requests):
    """Yields the answer to each request, in order; the workers take turns. Drops what an earlier, unfinished call asked for."""
    for worker in workers:
        while worker.pending:
            worker.receive()
    under_way = deque()
    for worker, request in zip(itertools.cycle(workers), requests):
        worker.ask(request)
        under_way.append(worker)
        if len(under_way) == AHEAD * len(workers):
            yield under_way.popleft().receive()
    while under_way:
        yield under_way.popleft().receive()


def settle():
    """Makes a process good at work on pictures: one thread, and memory that stays."""
    cv2.setNumThreads(0)
    keep_freed_memory()


def _work(answer, connection):
    for number in _SIGNALS:  # it leaves when the pipe ends, whatever ends the process at the other side
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for end in _ends:  # else they would stay open when the process at the other side is gone
        end.close()
    settle()
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            result, failure = None, None
            try:
                result = answer(request)
            except Exception:
                failure = traceback.format_exc()
            connection.send((result, failure))


def _close(connection, process):
    connection.close()  # the worker reads the end of its pipe and leaves
    process.join(1)
    if process.is_alive():
        process.kill()
        process.join()


def _state(pid):
    """What Linux says a process does."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "in an unknown state"
    return {"T": "stopped; `kill -CONT` lets it go on", "t": "stopped by a debugger", "D": "waiting for the disk or the network",
            "R": "computing"}.get(letter, "sleeping")
