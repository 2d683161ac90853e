"""What the sources of pictures share: names in one block of memory, reading with one kind of error, checks of files."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from ppdensecl.data.picture import UndecodableError, decode
from ppdensecl.errors import UserError

MAX_BYTES = 2**31  # of an encoded picture: twelve for each pixel that `decode` accepts
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".jp2")
NONE_FOUND = f"holds no pictures; files ending in {', '.join(SUFFIXES)} (upper or lower case) are looked for"


class Names:
    """An immutable sequence of byte strings as one block of memory and an index.

    A list of a million strings is a million objects, and a forked worker that only looks at them changes their
    reference counts and so copies their pages; here there is nothing to count.
    """

    def __init__(self, names):
        names = list(names)
        self._bytes = b"".join(names)
        self._ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, i) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return self._bytes[self._ends[i - 1] if i else 0 : self._ends[i]]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._bytes)
        digest.update(self._ends)  # "ab", "c" is another list than "a", "bc"
        return digest.hexdigest()


class Source:
    """What the sources share. A subclass sets `where` (the prefix of shown names) and `names`, and defines `_read`."""

    where: str
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Path of the file or "archive!member"; bytes that are not UTF-8 are shown escaped."""
        return self.where + self.names[i].decode("utf-8", "backslashreplace")

    def read(self, i: int) -> bytes:
        """The encoded picture. Raises UndecodableError where it cannot be read any more."""
        try:
            return self._read(i)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UndecodableError(self.name(i), getattr(error, "strerror", None) or str(error)) from None

    def picture(self, i: int, fewest=None) -> np.ndarray:
        """uint8 [H, W, 3] RGB; smaller where `fewest` allows it, see `decode`. Raises UndecodableError."""
        return decode(self.read(i), self.name(i), fewest)

    def fingerprint(self) -> str:
        """Over the names relative to the root, so that it does not depend on where the data is mounted."""
        return self.names.fingerprint()


def check_bytes(size):
    if size > MAX_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB are more than any picture has")


def sha256_of(path):
    """The sha256 of a file, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            sha256.update(piece)
    return sha256.hexdigest()


def existing(key, path, right, is_right):
    """`path` if `is_right(path)`; otherwise a UserError that says what the config key should name."""
    if path is None:
        raise UserError(f"{key} is not set; it should be {right}")
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{key}: {path} does not exist; it should be {right}")
    if not is_right(path):
        raise UserError(f"{key}: {path} is a {'folder' if os.path.isdir(path) else 'file'}; it should be {right}")
    return path


def contents(key, path, size=-1):
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
