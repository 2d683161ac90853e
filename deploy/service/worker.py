"""One thread that computes what many requests wait for, in batches of what is there."""

import asyncio
import queue
import threading
from time import perf_counter

import numpy as np


class Worker:
    """await worker.outputs(view) from any number of coroutines; the views of a batch have one size.

    Args:
        engine: see ppdensecl.inference.engines.
        model: the export, see ppdensecl.inference.exported.
        batch_size: at most so many views are computed together. Nobody waits for a batch to fill.
        on_batch: called with (views, seconds) after each batch, in the worker's thread.
    """

    def __init__(self, engine, model, batch_size, on_batch):
        self._engine, self._model, self._batch_size, self._on_batch = engine, model, batch_size, on_batch
        self._waiting = queue.SimpleQueue()  # its length is bounded by the number of requests that are let in
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def outputs(self, view):
        """uint8 [h, w, 3] → {output's name: float32 array of this picture}."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.put((view, future, loop))
        return await future

    def stop(self):
        """Ends the thread after what waits now."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self):
        while True:
            jobs = [self._waiting.get()]
            while jobs[-1] is not None and len(jobs) < self._batch_size and not self._waiting.empty():
                jobs.append(self._waiting.get())
            last = jobs[-1] is None
            jobs = [job for job in jobs if job is not None and not job[1].cancelled()]  # whose request has timed out
            if jobs:
                self._compute(jobs)
            if last:
                return

    def _compute(self, jobs):
        started = perf_counter()
        try:
            outputs = self._engine.run(self._model.normalised(np.stack([view for view, _, _ in jobs])))
            results = [{name: values[i].copy() for name, values in outputs.items()} for i in range(len(jobs))]
        except Exception as error:  # of one batch; the requests of the next may go well
            results = [error] * len(jobs)
        self._on_batch(len(jobs), perf_counter() - started)
        for (_, future, loop), result in zip(jobs, results):
            loop.call_soon_threadsafe(_settle, future, result)


def _settle(future, result):
    if future.cancelled():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
