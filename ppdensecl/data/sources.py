"""Where pictures come from: a folder, a list, COCO, an LMDB, an archive. No source knows any labels.

Every source is a sequence of pictures in an order that depends on the data alone, and holds only a compact index:

    len(source)            how many pictures
    source.name(i)         what to call picture i in a message to the user
    source.read(i)         its encoded bytes
    source.picture(i)      its pixels, uint8 [H, W, 3] RGB; source.picture(i, fewest): a JPEG's maybe fewer, see `picture.decode`
    source.fingerprint()   a hex digest by which processes see that they have the same list

Opening bad input raises UserError; a picture that is gone or broken raises UndecodableError when it is read. Sources may
be used in any process after a fork.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import stat

import numpy as np

from ppdensecl.data.containers import ArchiveSource, LmdbSource
from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.source import NONE_FOUND, SUFFIXES, Names, Source, check_bytes, contents, existing
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.errors import UserError

_SUFFIX_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)


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


def spread(source, count, rank=0, world_size=1):
    """About `count` pictures spread evenly over a source, or one rank's share of them: yields (index, picture). For a broken one
    comes the next that can be decoded before the next chosen one, if any: so none comes twice, on whatever rank."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist()
    for start, end in list(zip(chosen, [*chosen[1:], len(source)]))[rank::world_size]:
        for index in range(start, end):
            with contextlib.suppress(UndecodableError):
                yield index, source.picture(index)
                break


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
            check_bytes(status.st_size)
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


class FolderSource(_Files):
    """All pictures at any depth below a folder, sorted by relative path.

    Hidden files and folders are skipped. Links to folders are followed, but each folder is entered once: under its own
    name if that lies below the root, otherwise under the first of its links.
    """

    def __init__(self, root):
        root = existing("data.root", root, "the folder that holds the pictures", os.path.isdir)
        super().__init__(root, sorted(_scan(root)))
        if not len(self):
            raise UserError(f"data.root: {root} {NONE_FOUND}")


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
        list_file = existing("data.list_file", list_file, "a text file with a path per line", os.path.isfile)
        if root is None:
            root = os.path.dirname(list_file)
        else:
            root = existing("data.root", root, "the folder that the listed paths are relative to", os.path.isdir)
        folder = os.fsencode(root)
        text = contents("data.list_file", list_file).removeprefix(b"\xef\xbb\xbf")  # the mark some editors write
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
        root = existing("data.root", root, "the folder that holds the pictures", os.path.isdir)
        annotation = existing("data.annotation", annotation, "a COCO annotation file (json)", os.path.isfile)
        _Files.__init__(self, root, _coco_names(annotation))
        self._check_root("data.annotation", annotation)


def _coco_names(annotation):
    problem = f"data.annotation: {annotation}"
    try:
        images = json.loads(contents("data.annotation", annotation))["images"]
        names = [image["file_name"].encode() for image in sorted(images, key=lambda image: image["id"])]
    except ValueError as error:
        raise UserError(f"{problem} is not valid JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{problem} should hold "images", a list of objects with "id" and "file_name"') from None
    if not names:
        raise UserError(f'{problem} has an empty list "images"; it should name at least one picture')
    return names
