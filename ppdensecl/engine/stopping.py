"""How a run ends before its time: asked to by SIGTERM or Ctrl-C, or because another of its processes is gone.

A signal may come to all ranks or to one, at another moment to each, and a rank that stopped alone would leave the others
waiting. So the ranks exchange what they were sent, about once a second, after an iteration that all of them know: the same
message carries how long an iteration takes, and the slowest rank's time says after how many iterations the next one is due.
Nothing waits for the device in between.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time

import paddle

from ppdensecl import parallel
from ppdensecl.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXCHANGE = 1.0  # seconds between two exchanges
# Paddle's launcher sends SIGTERM three times, 0.2 seconds apart, and `timeout` twice: within this time it is one request.
SAME_REQUEST = 2.0


class StopRequest:
    """While entered (in the main thread), the first SIGTERM or SIGINT is a request; another one ends the process at once."""

    def __init__(self):
        self.signal, self._since = 0, 0.0
        self._before = {}
        self._iterations, self._due, self._clock = 0, 1, time.monotonic()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _received(self, number, _):
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            # Not through the log: the signal may have come while a line of it was written.
            with contextlib.suppress(OSError):
                text = f"\n{name}: the run ends with a checkpoint after this iteration; once more ends it at once\n"
                os.write(2, text.encode())
        elif time.monotonic() - self._since > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self):
        """The signal for which all ranks end after this iteration, or 0. All ranks call it after every iteration."""
        if parallel.world_size() == 1:
            return self.signal
        self._iterations += 1
        if self._iterations < self._due:
            return 0
        mine = [float(self.signal), (time.monotonic() - self._clock) / self._iterations]
        signals, seconds = parallel.gather(paddle.to_tensor([mine])).numpy().max(axis=0)
        self._iterations, self._due, self._clock = 0, max(1, int(EXCHANGE / max(seconds, 1e-6))), time.monotonic()
        return int(signals)


class PeerLost(UserError):
    """Another process of the run is gone. The tools wait `linger` seconds before they end: the launcher looks once a second
    and reports the first rank that it finds dead, which must be the one that failed, not one that failed because of it."""

    linger = 10.0


@contextlib.contextmanager
def peers_watched():
    """Makes a PeerLost of a collective's error about a process that does not answer."""
    try:
        yield
    except RuntimeError as error:
        if parallel.world_size() == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        reason = str(error).strip().splitlines()[-1]
        log = os.path.join(os.environ.get("PADDLE_LOG_DIR", "log"), "workerlog.N")
        raise PeerLost(f"rank {parallel.rank()} lost another process of the run, which has ended or hangs ({reason}); see "
                       f"which rank N the launcher says has failed, and its log {log}, then go on with --resume") from None
