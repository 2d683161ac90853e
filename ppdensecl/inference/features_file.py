"""Features of any number of pictures as one .npz, in the memory of one batch.

A .npz is a zip of one .npy for each array, one after the other, while a batch brings rows for all of them. So each array has a
file of its own beside the .npz until the last batch; then they are put together and the file gets its name.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from array import array
from pathlib import Path

import numpy as np

from ppdensecl.errors import UserError


class FeaturesFile:
    """A context manager; there is a file `path` only if its block ends without an exception.

    Args:
        path: ends in .npz.
        name: gives the name of picture i, for the array "paths".
    """

    def __init__(self, path, name):
        self.path = Path(path)
        if self.path.suffix != ".npz":
            raise UserError(f"--output {path}: features are written as .npz; give a name that ends so")
        self._name = name
        self._parts = {}  # {output's name: (open file, shape of a row)}
        self._rows = array("q")

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part("npz").touch()
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def _part(self, name):
        return self.path.with_name(f".{self.path.stem}.{name}.tmp{os.getpid()}")

    def add(self, indices, outputs):
        """The rows of some pictures: their numbers, and {output's name: float32 [n, …]}, of the same shape each time."""
        try:
            for name, values in outputs.items():
                if name not in self._parts:
                    self._parts[name] = open(self._part(name), "wb"), values.shape[1:]
                self._parts[name][0].write(np.ascontiguousarray(values, "<f4"))
        except OSError as error:
            raise self._unwritable(error) from None
        self._rows.extend(indices)

    def __len__(self):
        return len(self._rows)

    def __exit__(self, kind, *_):
        try:
            if kind is None and self._rows:
                self._put_together()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            for name in (*self._parts, "npz"):
                with contextlib.suppress(OSError):
                    self._part(name).unlink()
            for file, _ in self._parts.values():
                with contextlib.suppress(OSError):
                    file.close()

    def _put_together(self):
        temporary = self._part("npz")
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, (part, shape) in self._parts.items():
                    part.close()
                    with _member(archive, name, "<f4", shape, len(self)) as member, open(self._part(name), "rb") as rows:
                        shutil.copyfileobj(rows, member, 1 << 20)
                    self._part(name).unlink()  # so that both together need room for one array more, not for all
                longest = max(len(self._name(i)) for i in self._rows)
                with _member(archive, "paths", f"<U{longest}", (), len(self)) as member:
                    for i in self._rows:
                        member.write(self._name(i).ljust(longest, "\0").encode("utf-32-le"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _unwritable(self, error):
        return UserError(f"--output {self.path}: cannot be written ({error.strerror}); free some space, or give another place")


def _member(archive, name, dtype, shape, count):
    """A stored .npy of `count` rows in a zip, open for writing behind its header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (count, *shape)})
    member = archive.open(f"{name}.npy", "w", force_zip64=True)
    member.write(header.getvalue())
    return member
