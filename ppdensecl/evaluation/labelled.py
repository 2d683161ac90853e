"""Pictures with labels, for the probes: a folder for each class, a list of `path label`, or the VOC2007 folder."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from ppdensecl.data.source import contents, existing
from ppdensecl.data.sources import FolderSource
from ppdensecl.errors import UserError

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
               "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


class Labelled(FolderSource):
    """Picture files with a label each: `labels` is int64 [n] (class from 0), or what else stands for picture i in row i."""

    def __init__(self, root, names, labels):
        super(FolderSource, self).__init__(root, names)
        self.root, self.labels = os.fspath(root), np.asarray(labels)

    def fingerprint(self):
        """Over the names, sizes and times of the files (not the labels): features that are kept depend on what is in them."""
        sha256 = hashlib.sha256(self.names.fingerprint().encode())
        for i in range(len(self)):
            try:
                status = os.stat(self._path(i))
            except OSError as error:
                raise UserError(f"{self.name(i)}: cannot be read ({error.strerror}); it is one of the given pictures") from None
            sha256.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
        return sha256.hexdigest()

    def shown(self, i):
        """The name relative to the root, as text for a result."""
        return self.names[i].decode("utf-8", "backslashreplace")

    def only(self, indices):
        """These pictures in this order."""
        return Labelled(self.root, [self.names[int(i)] for i in indices], self.labels[indices])


def shuffled(pictures, seed, part):
    """The same pictures with each other's labels: the control. Training and test labels are shuffled each for itself (`part`
    0 and 1), so that what a probe predicts is right as often as by chance, whatever the features are."""
    order = np.random.default_rng([seed, part]).permutation(len(pictures))
    return Labelled(pictures.root, [pictures.names[i] for i in range(len(pictures))], pictures.labels[order])


def open_pair(train, test, train_list, test_list, root=None):
    """(training pictures, test pictures, class names) from two folders of class folders, or from two lists. UserError."""
    if train_list or test_list:
        if train or test:
            raise UserError("--train-dir/--test-dir and --train-list/--test-list are given; use either folders or lists")
        pairs = [_list(option, path, root) for option, path in (("--train-list", train_list), ("--test-list", test_list))]
        options = ("--train-list", "--test-list")
    else:
        pairs = [_folders(option, path) for option, path in (("--train-dir", train), ("--test-dir", test))]
        options = ("--train-dir", "--test-dir")
    words = set(pairs[0][2])
    classes = sorted(words, key=int) if all(word.isascii() and word.isdigit() for word in words) else sorted(words)
    if len(classes) < 2:
        raise UserError(f"{options[0]}: all pictures are of the class '{classes[0]}'; a probe needs two classes at least")
    number = {word: i for i, word in enumerate(classes)}
    unknown = sorted(set(pairs[1][2]) - words)
    if unknown:
        raise UserError(f"{options[1]}: the class '{unknown[0]}' is not among those of {options[0]} ({len(classes)} classes, "
                        f"for example '{classes[0]}'); the classes must have the same names")
    return (*(Labelled(where, names, [number[word] for word in labels]) for where, names, labels in pairs), classes)


def _folders(option, root):
    """(root, relative paths, class names of them) of a folder of class folders."""
    root = existing(option, root, "a folder that holds a folder of pictures for each class", os.path.isdir)
    try:
        source = FolderSource(root)
    except UserError as error:
        raise UserError(str(error).replace("data.root", option, 1)) from None
    names = [source.names[i] for i in range(len(source))]
    loose = next((name for name in names if b"/" not in name), None)
    if loose is not None:
        raise UserError(f"{option}: {root} holds the picture {os.fsdecode(loose)}, which lies in no class's folder; expected "
                        "CLASS/picture.jpg")
    return root, names, [name.split(b"/")[0].decode("utf-8", "backslashreplace") for name in names]


def lines(option, path, right):
    """[(path, what follows its last blank)], bytes, of a list's lines; empty ones and those from # on are skipped."""
    path = existing(option, path, f"a text file with a line `{right}` for each picture", os.path.isfile)
    found = []
    for number, line in enumerate(contents(option, path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        line = line.strip()
        if line and not line.startswith(b"#"):
            parts = line.rsplit(None, 1)
            if len(parts) < 2:
                raise UserError(f"{path}:{number}: has one word, expected `{right}`")
            found.append(tuple(parts))
    if not found:
        raise UserError(f"{option}: {path} lists no pictures; expected lines `{right}`")
    return found


def _list(option, path, root):
    found = lines(option, path, "path label")
    where = _root(path, root)
    return where, [name for name, _ in found], [label.decode("utf-8", "backslashreplace") for _, label in found]


def _root(path, root):
    if root is None:
        return os.path.dirname(os.path.abspath(path))
    return existing("--root", root, "the folder that the listed paths are relative to", os.path.isdir)


def open_segmentation(option, path, root=None):
    """Pictures with the paths of their label maps, from a list of `image label` (as PaddleSeg's). Raises UserError."""
    found = lines(option, path, "image label")
    return Labelled(_root(path, root), [name for name, _ in found], [os.fsdecode(label) for _, label in found])


def open_voc07(folder):
    """(trainval, test, class names) of VOCdevkit/VOC2007; labels int8 [n, 20]: 1 there, 0 difficult, −1 not. UserError."""
    folder = existing("--voc07", folder, "the folder VOCdevkit/VOC2007", os.path.isdir)
    sets, pictures = os.path.join(folder, "ImageSets", "Main"), os.path.join(folder, "JPEGImages")
    wanted = [os.path.join(sets, f"{name}_{part}.txt") for part in ("trainval", "test") for name in VOC_CLASSES]
    missing = [path for path in (pictures, sets) if not os.path.isdir(path)]
    missing = missing or [path for path in wanted if not os.path.isfile(path)]
    if missing:
        raise UserError(f"--voc07: {missing[0]} is missing" + (f" (and {len(missing) - 1} others)" if missing[1:] else "") +
                        "; VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar are both needed, unpacked in one place")
    parts = []
    for part in ("trainval", "test"):
        ids, columns = None, []
        for name in VOC_CLASSES:
            path = os.path.join(sets, f"{name}_{part}.txt")
            found = lines("--voc07", path, "picture -1, 0 or 1")
            if ids is not None and [i for i, _ in found] != ids:
                raise UserError(f"{path}: lists other pictures than {VOC_CLASSES[0]}_{part}.txt; unpack the archives again")
            if any(label not in (b"-1", b"0", b"1") for _, label in found):
                raise UserError(f"{path}: has a label that is none of -1, 0, 1; unpack the archives again")
            ids = [i for i, _ in found]
            columns.append([int(label) for _, label in found])
        parts.append(Labelled(pictures, [i + b".jpg" for i in ids], np.array(columns, np.int8).T))
        gone = next((i for i in range(len(ids)) if not os.path.exists(parts[-1]._path(i))), None)
        if gone is not None:
            raise UserError(f"--voc07: {parts[-1].name(gone)} is missing, which {VOC_CLASSES[0]}_{part}.txt lists; unpack "
                            "the archives again")
    return (*parts, VOC_CLASSES)
