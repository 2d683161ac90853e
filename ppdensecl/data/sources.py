"""Where pictures come from: a folder, a list, COCO, an LMDB, an archive. No source knows any labels.

Every source is a sequence of pictures in an order that depends on the data alone, and holds only a compact index:

    len(source)            how many pictures
    source.name(i)         what to call picture i in a message to the user
    source.read(i)         its encoded bytes
    source.picture(i)      its pixels, uint8 [H, W, 3] RGB
    source.fingerprint()   a hex digest by which processes see that they have the same list

Opening bad input raises UserError; a picture that is gone or broken raises UndecodableError when it is read. Sources may
be used in any process after a fork.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from ppdensecl.data.picture import UndecodableError, decode
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.errors import UserError

MAX_BYTES = 2**31  # of an encoded picture: twelve for each pixel that `decode` accepts
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".jp2")
_SUFFIX_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)
_NONE_FOUND = f"holds no pictures; files ending in {', '.join(SUFFIXES)} (upper or lower case) are looked for"


def open_source(kind, *, root=None, list_file=None, annotation=None, synthetic_count=1024, seed=0):
    """The source that a config's `data` section asks for; what the kind does not use is ignored.

    kind: folder | list | coco | lmdb | archive | synthetic; `seed` is that of the synthetic scenes. Raises UserError.
    """
    if kind == "folder":
        return FolderSource(root)
    if kind == "list":
        return ListSource(list_file, root)
    if kind == "coco":
        return CocoSource(root, annotation)
    if kind == "lmdb":
        return LmdbSource(root)
    if kind == "archive":
        return ArchiveSource(root)
    if kind == "synthetic":
        return SyntheticSource(synthetic_count, seed)
    raise UserError(f"data.source: {kind!r} is none of folder, list, coco, lmdb, archive, synthetic")


def spread(source, count):
    """About `count` pictures spread evenly over a source: yields (index, picture), the next decodable one for a broken one."""
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist():
        for at in range(index, index + len(source)):
            try:
                yield at % len(source), source.picture(at % len(source))
                break
            except UndecodableError:
                continue


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

    def picture(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Raises UndecodableError."""
        return decode(self.read(i), self.name(i))

    def fingerprint(self) -> str:
        """Over the names relative to the root, so that it does not depend on where the data is mounted."""
        return self.names.fingerprint()


class _Files(Source):
    """Pictures that are files; `names` are relative to `root`, or absolute."""

    def __init__(self, root, names):
        self._root = os.fsencode(root)
        self.names = Names(names)

    def name(self, i):
        return self._path(i).decode("utf-8", "backslashreplace")

    def _path(self, i):
        return os.path.join(self._root, self.names[i])

    def _read(self, i):
        with open(self._path(i), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            _check_bytes(status.st_size)
            return file.read()

    def _check_root(self, key, path):
        """A wrong root would otherwise show as a million missing pictures, one by one."""
        first = range(min(100, len(self)))
        if not any(os.path.exists(self._path(i)) for i in first):
            raise UserError(
                f"{key}: none of the first {len(first)} pictures of {path} exists, for example {self.name(0)}; "
                f"data.root should be the folder that their names are relative to"
            )


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # or opening a named pipe would wait for who writes into it


def _check_bytes(size):
    if size > MAX_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB are more than any picture has")


class FolderSource(_Files):
    """All pictures at any depth below a folder, sorted by relative path.

    Hidden files and folders are skipped. Links to folders are followed, but each folder is entered once: under its own
    name if that lies below the root, otherwise under the first of its links.
    """

    def __init__(self, root):
        root = _existing("data.root", root, "the folder that holds the pictures", os.path.isdir)
        super().__init__(root, sorted(_scan(root)))
        if not len(self):
            raise UserError(f"data.root: {root} {_NONE_FOUND}")


def _scan(root):
    """Relative paths (bytes) of the pictures below `root`, in no particular order."""
    root = os.fsencode(root)
    found, entered = [], set()
    folders, links = [b""], []  # links wait until all folders have been entered under their own names
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif entry.is_dir():
                        heapq.heappush(links, name)
                    # A dangling link was meant to be a picture: it is reported when it is read.
                    elif name.lower().endswith(_SUFFIX_BYTES) and (entry.is_file() or entry.is_symlink()):
                        found.append(name)
        except OSError as error:
            raise UserError(f"data.root: {os.fsdecode(path)} cannot be read: {error.strerror}") from None
    return found


class ListSource(_Files):
    """The pictures that a text file names, one a line, in its order, relative to `root` or to the list file's folder.

    Empty lines and lines that start with # are skipped. A line with blanks may be a path with blanks, or a path and
    something else, such as a label. Of these the first that exists is the path: the whole line, the part before the
    first tab, the part before the last space. Where none does, it is the whole line.
    """

    def __init__(self, list_file, root=None):
        list_file = _existing("data.list_file", list_file, "a text file with a path per line", os.path.isfile)
        if root is None:
            root = os.path.dirname(list_file)
        else:
            root = _existing("data.root", root, "the folder that the listed paths are relative to", os.path.isdir)
        folder = os.fsencode(root)
        text = _contents("data.list_file", list_file).removeprefix(b"\xef\xbb\xbf")  # the mark some editors write
        lines = (line.strip() for line in text.splitlines())
        super().__init__(root, [_listed_path(line, folder) for line in lines if line and not line.startswith(b"#")])
        if not len(self):
            raise UserError(f"data.list_file: {list_file} lists no pictures; it should hold a path per line")
        self._check_root("data.list_file", list_file)


def _listed_path(line, folder):
    readings = [line, line.split(b"\t")[0].rstrip(), line.rpartition(b" ")[0].rstrip()]
    readings = [reading for reading in dict.fromkeys(readings) if reading]
    if len(readings) == 1:  # not worth a look at the disk
        return line
    return next((path for path in readings if os.path.isfile(os.path.join(folder, path))), line)


class CocoSource(FolderSource):
    """A COCO image folder; with an annotation file the pictures in its "images", by ascending id, otherwise all.

    The whole annotation is parsed for its list of pictures: image_info_*.json or captions_*.json load in seconds,
    instances_train2017.json takes some gigabytes of memory for a moment.
    """

    def __init__(self, root, annotation=None):
        if annotation is None:
            super().__init__(root)
            return
        root = _existing("data.root", root, "the folder that holds the pictures", os.path.isdir)
        annotation = _existing("data.annotation", annotation, "a COCO annotation file (json)", os.path.isfile)
        _Files.__init__(self, root, _coco_names(annotation))
        self._check_root("data.annotation", annotation)


def _coco_names(annotation):
    problem = f"data.annotation: {annotation}"
    try:
        images = json.loads(_contents("data.annotation", annotation))["images"]
        names = [image["file_name"].encode() for image in sorted(images, key=lambda image: image["id"])]
    except ValueError as error:
        raise UserError(f"{problem} is not valid JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{problem} should hold "images", a list of objects with "id" and "file_name"') from None
    if not names:
        raise UserError(f'{problem} has an empty list "images"; it should name at least one picture')
    return names


class LmdbSource(Source):
    """An LMDB whose values are encoded pictures, sorted by key; keys that start with __meta__ are skipped.

    `root` is the folder of data.mdb, or the database file itself.
    """

    def __init__(self, root):
        path = _existing("data.root", root, "an LMDB folder or file", os.path.exists)
        self._file = os.path.realpath(os.path.join(path, "data.mdb") if os.path.isdir(path) else path)
        self.where = f"{root}!"
        try:
            import lmdb
        except ImportError:
            raise UserError("data.source: lmdb needs the Python package of that name; `pip install lmdb`") from None
        try:
            with _lmdb_environment(self._file).begin() as transaction:
                keys = transaction.cursor().iternext(values=False)
                self.names = Names(key for key in keys if not key.startswith(b"__meta__"))
        except lmdb.Error as error:
            reason = str(error).rpartition(": ")[2]
            raise UserError(f"data.root: {root} should be an LMDB of encoded pictures: {reason}") from None
        if not len(self):
            raise UserError(f"data.root: {root} is an empty LMDB; it should map a name to an encoded picture")

    def _read(self, i):
        import lmdb

        try:
            with _lmdb_environment(self._file).begin() as transaction:
                value = transaction.get(self.names[i])
        except lmdb.Error as error:
            raise OSError(str(error)) from None
        if value is None:
            raise OSError("no longer in the LMDB")
        return value


_lmdb_environments = {}  # file: (process, environment)


def _lmdb_environment(file):
    """The database opened by this process: it must not be used across a fork, nor be opened twice in one process."""
    import lmdb

    process, environment = _lmdb_environments.get(file, (None, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()  # the parent's; only this process's mapping of it goes away
        environment = lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False)
        _lmdb_environments[file] = os.getpid(), environment
    return environment


class ArchiveSource(Source):
    """The pictures in a .zip or an uncompressed .tar, read in place, sorted by name; nothing is ever unpacked to disk.

    Hidden members and links are skipped; of members of the same name the last counts.
    """

    def __init__(self, root):
        self._archive = _existing("data.root", root, "a .zip or .tar archive", os.path.isfile)
        self.where = f"{root}!"
        magic = _contents("data.root", root, 6)
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
            raise UserError(f"data.root: {root} {_NONE_FOUND}")
        names = sorted(members)
        self.names = Names(names)
        # of a tar: offset and size of the data; of a zip: offset of the header, stored size, size, method, CRC-32
        self._index = np.array([members[name] for name in names], np.int64)

    def _read(self, i):
        offset, stored, *packed = self._index[i].tolist()
        _check_bytes(max(stored, *packed[:1]) if packed else stored)
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


def _existing(key, path, right, is_right):
    """`path` if `is_right(path)`; otherwise a UserError that says what the config key should name."""
    if path is None:
        raise UserError(f"{key} is not set; it should be {right}")
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{key}: {path} does not exist; it should be {right}")
    if not is_right(path):
        raise UserError(f"{key}: {path} is a {'folder' if os.path.isdir(path) else 'file'}; it should be {right}")
    return path


def _contents(key, path, size=-1):
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
