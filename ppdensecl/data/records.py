"""What a cache holds of each picture: its bytes, or a smaller JPEG of it; made in worker processes."""

from __future__ import annotations

from typing import NamedTuple, Optional

from PIL import Image

import cv2
import numpy as np

from ppdensecl.data.picture import UndecodableError, decode
from ppdensecl.data.worker import Worker, answers

CHUNK = 4  # pictures that a worker is given at once
NAME_BYTES = 480  # of a name in a key, of which LMDB allows 511
JPEG_SIDE = 65500  # the longest that libjpeg writes


class Record(NamedTuple):
    index: int
    key: bytes
    data: Optional[bytes]  # None for a picture that is left out
    before: int = 0  # bytes in the source
    reduced: bool = False
    bad: tuple = ()  # (name, reason)


class Encoder:
    """index → Record. Every picture is decoded, for the cache shall hold no broken one."""

    def __init__(self, source, short_side, quality):
        self.source, self.short_side, self.quality = source, short_side, quality

    def __call__(self, index):
        name = self.source.names[index] if hasattr(self.source, "names") else self.source.name(index).encode()
        key = b"%09d/" % index + name[-NAME_BYTES:]
        try:
            data = self.source.read(index)
            picture = decode(data, self.source.name(index))
        except UndecodableError as error:
            return Record(index, key, None, bad=(error.name, error.reason))
        smaller = self._reduced(picture)
        return Record(index, key, data if smaller is None else smaller, len(data), smaller is not None)

    def _reduced(self, picture):
        """The JPEG of a picture that is too large (upright, without EXIF), None for others."""
        short, long = sorted(picture.shape[:2])
        if not self.short_side or short <= self.short_side or long * self.short_side / short > JPEG_SIDE:
            return None
        height, width = (round(side * self.short_side / short) for side in picture.shape[:2])
        # Lanczos: the views will be resampled once more, and of the antialiased filters it leaves the most for that.
        smaller = Image.fromarray(picture).resize((width, height), Image.LANCZOS, reducing_gap=3.0)
        smaller = cv2.cvtColor(np.asarray(smaller), cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1].tobytes()


def encoded(encode, indices, workers):
    """Yields the Record of each index, in order.

    Args:
        encode: an Encoder.
        indices: a list.
        workers: processes; 0 does it in this one.
    """
    if not workers:
        yield from map(encode, indices)
        return
    starts, pool = range(0, len(indices), CHUNK), []
    try:
        for _ in range(min(workers, len(starts))):
            pool.append(Worker(lambda chunk: list(map(encode, chunk)), "a worker",
                               "lower --workers, then the same command goes on"))
        for records in answers(pool, (indices[start:start + CHUNK] for start in starts)):
            yield from records
    finally:
        for worker in pool:
            worker.close()
