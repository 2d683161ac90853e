"""What every request passes: limits of number, size and time, and the counting of what became of it."""

import asyncio
import contextlib
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter("ppdensecl_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("ppdensecl_request_seconds", "From the first byte to the answer", ["path"], buckets=_SECONDS,
                                 registry=self.registry)
        self.let_in = Gauge("ppdensecl_requests_let_in", "Requests that wait or are computed now", registry=self.registry)
        self.batch = Histogram("ppdensecl_batch_pictures", "Pictures computed together", buckets=(1, 2, 4, 8, 16, 32),
                               registry=self.registry)
        self.engine = Histogram("ppdensecl_batch_seconds", "Of the network, a batch", buckets=_SECONDS, registry=self.registry)

    def batch_done(self, pictures, seconds):
        self.batch.observe(pictures)
        self.engine.observe(seconds)


class Guard:
    """ASGI middleware. Requests with a body are let in up to `queue` at a time (else 503), with at most `max_bytes` (else 413),
    and are answered within `timeout` seconds: else 408, where the body has not come by then, or 504."""

    def __init__(self, app, metrics, paths, queue, max_bytes, timeout):
        self.app, self.metrics, self.paths = app, metrics, paths
        self.queue, self.max_bytes, self.timeout = queue, max_bytes, timeout
        self._let_in = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), []

        async def watched_send(message):
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        body = _Body(receive, self.max_bytes, self.timeout)
        try:
            if scope["method"] == "POST":
                await self._limited(scope, body, watched_send, status)
            else:
                await self.app(scope, body.receive, watched_send)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status[0] if status else 500).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _limited(self, scope, body, send, status):
        async def answer(code, text, headers):
            await JSONResponse({"error": text}, code, headers)(scope, body.receive, send)

        async def refuse(code, text, headers):
            if _header(scope, b"expect").lower() == b"100-continue":  # to read would be to ask for what is refused
                headers = {**headers, "Connection": "close"}
            else:
                await body.discard()
            await answer(code, text, headers)

        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self.max_bytes:
            await refuse(413, body.too_large, {"Connection": "close"})
            return
        if self._let_in >= self.queue:
            await refuse(503, f"{self.queue} requests wait already; try again later", {"Retry-After": "1"})
            return
        self._change(1)
        try:
            await asyncio.wait_for(self.app(scope, body.receive, send), self.timeout)
        except asyncio.TimeoutError:
            if not status:  # else the client does not read, and uvicorn closes the connection
                code, text = (504, "no answer") if body.complete else (408, "the body did not come")
                await answer(code, f"{text} within {self.timeout:g} seconds", {"Connection": "close"})
        except ClientDisconnect:
            status[:] = [499]
        finally:
            self._change(-1)

    def _change(self, by):
        self._let_in += by
        self.metrics.let_in.set(self._let_in)


def _header(scope, name):
    return dict(scope["headers"]).get(name, b"")


class _Body:
    """Counts what `receive` brings: 413 beyond `most` bytes."""

    def __init__(self, receive, most, seconds):
        self._receive, self._most, self._seconds = receive, most, seconds
        self._bytes, self.complete = 0, False
        self.too_large = f"the body is larger than {most / 1e6:g} MB"

    async def receive(self):
        message = await self._next()
        if self._bytes > self._most:
            await self.discard()
            raise HTTPException(413, self.too_large, {"Connection": "close"})
        return message

    async def _next(self):
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        self.complete = self.complete or not message.get("more_body", False)
        return message

    async def discard(self):
        """Reads on, up to four times what is allowed: a client that still writes would not read the answer."""
        async def read():
            while not self.complete and self._bytes <= 4 * self._most:
                await self._next()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), self._seconds)
