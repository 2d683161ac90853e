"""Many pictures in one file: an LMDB, a .zip or a .tar. They are read in place, and in any process after a fork."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from ppdensecl.data.source import NONE_FOUND, SUFFIXES, Names, Source, check_bytes, contents, existing
from ppdensecl.errors import UserError

META = b"__meta__"  # the key under which `cache.prepare` says what it made; keys that start with it hold no pictures
PARTIAL = ".partial"  # after the name of a cache that is not finished


class LmdbSource(Source):
    """An LMDB whose values are encoded pictures, sorted by key; keys that start with __meta__ are skipped.

    `root` is the folder of data.mdb, or the database file itself. A cache of `cache.prepare` must be finished.
    """

    def __init__(self, root):
        if root is not None and not os.path.exists(root) and os.path.isfile(f"{root}{PARTIAL}"):
            root = f"{root}{PARTIAL}"
        path = existing("data.root", root, "an LMDB folder or file", os.path.exists)
        self._file = os.path.realpath(os.path.join(path, "data.mdb") if os.path.isdir(path) else path)
        self.where = f"{root}!"
        try:
            import lmdb
        except ImportError:
            raise UserError("data.source: lmdb needs the Python package of that name; `pip install lmdb`") from None
        try:
            with lmdb_environment(self._file).begin() as transaction:
                meta = read_meta(transaction)
                keys = transaction.cursor().iternext(values=False)
                self.names = Names(key for key in keys if not key.startswith(META))
        except lmdb.Error as error:
            reason = str(error).rpartition(": ")[2]
            raise UserError(f"data.root: {root} should be an LMDB of encoded pictures: {reason}") from None
        if meta and not meta.get("done"):
            close_lmdb(self._file)
            output = str(root)[:-len(PARTIAL)] if str(root).endswith(PARTIAL) else root
            raise UserError(f"data.root: {root} is a cache that is not finished; this goes on with it, with the arguments that "
                            f"began it: python tools/prepare_data.py lmdb --output {output}")
        if not len(self):
            raise UserError(f"data.root: {root} is an empty LMDB; it should map a name to an encoded picture")

    def _read(self, i):
        import lmdb

        try:
            with lmdb_environment(self._file).begin() as transaction:
                value = transaction.get(self.names[i])
        except lmdb.Error as error:
            raise OSError(str(error)) from None
        if value is None:
            raise OSError("no longer in the LMDB")
        return value


def read_meta(transaction):
    """What `cache.prepare` wrote about its LMDB, or None for an LMDB of somebody else."""
    try:
        meta = json.loads(transaction.get(META, b"null"))
    except ValueError:
        return None
    return meta if isinstance(meta, dict) and "ppdensecl" in meta else None


_lmdb_environments = {}  # file: (process, environment)


def lmdb_environment(file):
    """The database opened by this process: it must not be used across a fork, nor be opened twice in one process."""
    import lmdb

    process, environment = _lmdb_environments.get(file, (None, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()  # the parent's; only this process's mapping of it goes away
        environment = lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False)
        _lmdb_environments[file] = os.getpid(), environment
    return environment


def close_lmdb(file):
    """Closes what this process has opened of it; the next read opens it anew."""
    _, environment = _lmdb_environments.pop(file, (None, None))
    if environment is not None:
        environment.close()


class ArchiveSource(Source):
    """The pictures in a .zip or an uncompressed .tar, read in place, sorted by name; nothing is ever unpacked to disk.

    Hidden members and links are skipped; of members of the same name the last counts.
    """

    def __init__(self, root):
        self._archive = existing("data.root", root, "a .zip or .tar archive", os.path.isfile)
        self.where = f"{root}!"
        magic = contents("data.root", root, 6)
        self._is_zip = magic.startswith(b"PK")
        if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
            raise UserError(
                f"data.root: {root} is compressed, so that no picture in it can be reached directly; "
                f"decompress it with gunzip, bunzip2 or unxz and name the resulting .tar"
            )
        try:
            members = _zip_index(root) if self._is_zip else _tar_index(root)
        except (zipfile.BadZipFile, tarfile.TarError, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(
                f"data.root: {root} should be a complete, unencrypted .tar or .zip (stored or deflated): {error}"
            ) from None
        if not members:
            raise UserError(f"data.root: {root} {NONE_FOUND}")
        names = sorted(members)
        self.names = Names(names)
        # of a tar: offset and size of the data; of a zip: offset of the header, stored size, size, method, CRC-32
        self._index = np.array([members[name] for name in names], np.int64)

    def _read(self, i):
        offset, stored, *packed = self._index[i].tolist()
        check_bytes(max(stored, *packed[:1]) if packed else stored)
        # Opened for each picture: an open file's position would be shared with other processes.
        with open(self._archive, "rb") as file:
            file.seek(offset)
            if self._is_zip:
                header = file.read(30)
                file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
            data = file.read(stored)
        if self._is_zip:
            data = _unpack(data, *packed)
        elif len(data) != stored:
            raise OSError("the archive is cut short")
        return data


def _unpack(data, size, method, checksum):
    try:
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # no more than was announced
    except zlib.error:
        raise OSError("damaged in the archive") from None
    if len(data) != size or zlib.crc32(data) != checksum:
        raise OSError("damaged in the archive")
    return data


def _zip_index(path):
    members = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not _is_picture(member.filename):
                continue
            if member.flag_bits & 1:
                raise ValueError(f"{member.filename} is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is packed by method {member.compress_type}")
            members[_encode(member.filename)] = (
                member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC
            )  # fmt: skip
    return members


def _tar_index(path):
    members = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            archive.members.clear()  # or it would keep an object for each
            if member.isreg() and not member.issparse() and _is_picture(member.name):
                members[_encode(member.name)] = member.offset_data, member.size
    return members


def _is_picture(member):
    hidden = any(part.startswith(".") and part not in (".", "..") for part in member.split("/"))
    return member.lower().endswith(SUFFIXES) and not hidden


def _encode(name):
    return name.encode("utf-8", "surrogateescape")
