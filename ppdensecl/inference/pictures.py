"""Pictures in, views out: a file, a folder or a list, decoded by threads a little ahead of who computes on them."""

from __future__ import annotations

import itertools
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.source import Names, Source
from ppdensecl.data.sources import FolderSource, ListSource
from ppdensecl.errors import UserError


class _OneFile(Source):
    where = ""

    def __init__(self, path):
        self.names = Names([os.fsencode(path)])

    def _read(self, i):
        with open(self.names[i], "rb") as file:
            return file.read()


def open_pictures(path, option="--image-dir"):
    """A source of pictures: a folder (at any depth), a list (.txt, a path per line, relative to it), or one file.

    Raises UserError, which names the user's `option`.
    """
    try:
        if os.path.isdir(path):
            return FolderSource(path)
        if str(path).endswith(".txt"):
            return ListSource(path)
    except UserError as error:
        raise UserError(re.sub(r"data\.(root|list_file):", f"{option}:", str(error))) from None
    if not os.path.isfile(path):
        raise UserError(f"{option}: {path} does not exist; it should be a picture, a folder of pictures, or a .txt that lists some")
    return _OneFile(path)


def views(pictures, exported, batch_size, threads, on_bad):
    """Batches in order: (indices of the pictures, their views uint8 [n, h, w, 3]), n = `batch_size` but for the last.

    A picture that cannot be decoded is left out, and on_bad(UndecodableError) is called. With no `threads` each is decoded when
    it is asked for; otherwise so many decode, at most two batches ahead.
    """
    def one(index):
        try:
            return exported.seen(pictures.picture(index))
        except UndecodableError as error:
            return error

    ready = _in_order(one, len(pictures), threads, 2 * batch_size) if threads else map(one, range(len(pictures)))
    indices, batch = [], []
    for index, view in enumerate(ready):
        if isinstance(view, UndecodableError):
            on_bad(view)
            continue
        indices.append(index)
        batch.append(view)
        if len(batch) == batch_size:
            yield indices, np.stack(batch)
            indices, batch = [], []
    if batch:
        yield indices, np.stack(batch)


def _in_order(job, count, threads, ahead):
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            numbers = iter(range(count))
            waiting.extend(pool.submit(job, number) for number in itertools.islice(numbers, ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(job, number) for number in itertools.islice(numbers, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
