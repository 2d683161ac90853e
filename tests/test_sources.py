"""The sources: what they find, in which order, that they survive a fork, and what they say about bad input."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

from PIL import Image

import lmdb
import numpy as np
import pytest

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.sources import (
    ArchiveSource,
    CocoSource,
    FolderSource,
    ListSource,
    LmdbSource,
    Names,
    SyntheticSource,
    _lmdb_environments,
    open_source,
)
from ppdensecl.errors import UserError


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (4, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder, *names):
    """Pictures whose grey value is their position in `names`."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return folder


def make_lmdb(folder, items):
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return folder


def make_zip(path, items, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in items.items():
            archive.writestr(name, data)
    return path


def make_tar(path, items, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in items.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def names(source, root=None):
    prefix = f"{root}{os.sep}" if root else ""
    return [source.name(i)[len(prefix) :] for i in range(len(source))]


def values(source):
    return [int(source.picture(i)[0, 0, 0]) for i in range(len(source))]


def in_a_fork(call):
    """What `call` returns (an int below 256) in a child process."""
    child = os.fork()
    if child == 0:
        result = 255
        try:
            result = call()
        finally:
            os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(*parts):
    """A context that expects a UserError of one sentence with all `parts`."""

    class Refused:
        def __enter__(self):
            self.raises = pytest.raises(UserError)
            self.caught = self.raises.__enter__()

        def __exit__(self, *exception):
            result = self.raises.__exit__(*exception)
            message = str(self.caught.value)
            assert all(str(part) in message for part in parts), message
            assert "\n" not in message
            return result

    return Refused()


# Names


def test_names_hold_any_bytes():
    items = [b"a.jpg", b"", "日本/é.jpg".encode(), b"\xff\xfe.png", b"x" * 300]
    held = Names(iter(items))
    assert list(held) == items and len(held) == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            held[outside]


def test_fingerprint_tells_lists_apart():
    prints = {Names(list_).fingerprint() for list_ in ([b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"ab"], [])}
    assert len(prints) == 5
    assert Names([b"ab", b"c"]).fingerprint() == Names([b"ab", b"c"]).fingerprint()


# Folder


def test_folder_finds_pictures_at_any_depth(tmp_path):
    make(tmp_path, "b.jpg", "a/deep/er/c.PNG", "a.JPEG", "a/z.webp", "a b/ü.tif")
    (tmp_path / "notes.txt").write_text("no picture")
    make(tmp_path, ".hidden/x.jpg", ".x.jpg", "a/.thumbs/y.jpg")
    make(tmp_path / "trap.jpg", "inside.png")  # a folder whose name looks like a picture
    source = open_source("folder", root=str(tmp_path))
    assert names(source, tmp_path) == sorted(names(source, tmp_path), key=str.encode)
    assert set(names(source, tmp_path)) == {
        "a b/ü.tif", "a.JPEG", "a/deep/er/c.PNG", "a/z.webp", "b.jpg", "trap.jpg/inside.png"
    }  # fmt: skip
    picture = source.picture(len(source) - 2)
    assert picture.shape == (3, 4, 3) and picture.dtype == np.uint8
    assert source.read(0) == (tmp_path / "a b/ü.tif").read_bytes()


def test_folder_follows_links_once(tmp_path):
    outside = make(tmp_path / "outside", "o.jpg")
    root = make(tmp_path / "root", "real/r.jpg", "zz/z.jpg")
    (root / "real" / "loop").symlink_to(root)
    (root / "a_link_to_real").symlink_to(root / "real")
    for number in range(40):
        (root / f"link{37 * number % 41}").symlink_to(outside)
    (root / "file_link.jpg").symlink_to(outside / "o.jpg")
    source = FolderSource(root)
    assert names(source, root) == ["file_link.jpg", "link0/o.jpg", "real/r.jpg", "zz/z.jpg"]
    assert values(source) == [0, 0, 0, 1]


def test_folder_with_a_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png(7))
    source = FolderSource(tmp_path)
    assert values(source) == [7]
    assert source.name(0).endswith("caf\\xe9.png") and source.name(0).encode()


def test_vanished_and_broken_files_are_undecodable(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"nonsense")
    with pytest.raises(UndecodableError, match="No such file") as caught:
        source.picture(0)
    assert caught.value.name == str(tmp_path / "a.png")
    with pytest.raises(UndecodableError, match="not a picture"):
        source.picture(1)
    assert source.picture(2)[0, 0, 0] == 2
    with pytest.raises(UndecodableError, match="No such file"):
        source.read(3)


def test_fingerprint_does_not_depend_on_the_mount_point(tmp_path):
    one, two = make(tmp_path / "one", "a.png", "b.png"), make(tmp_path / "two", "b.png", "a.png")
    assert FolderSource(one).fingerprint() == FolderSource(two).fingerprint()
    make(two, "c.png")
    assert FolderSource(one).fingerprint() != FolderSource(two).fingerprint()


def test_bad_folders(tmp_path):
    with refused("data.root", "not set"):
        open_source("folder")
    with refused("data.root", tmp_path / "none", "does not exist"):
        open_source("folder", root=tmp_path / "none")
    (tmp_path / "file").write_text("")
    with refused("data.root", tmp_path / "file", "is a file", "folder"):
        FolderSource(tmp_path / "file")
    with refused("data.root", tmp_path, "no pictures", ".jpeg"):
        FolderSource(tmp_path)


def test_unreadable_folder(tmp_path):
    make(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    code = (
        "import os, sys\nfrom ppdensecl.data.sources import FolderSource\n"
        "if os.geteuid() == 0: os.seteuid(65534)  # root may read everything\n"
        "try:\n    FolderSource('.')\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    tmp_path.chmod(0o755)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    (tmp_path / "locked").chmod(0o755)
    assert run.stdout.startswith("UserError data.root: ./locked cannot be read: Permission denied"), run


# List


def test_list_keeps_order_and_skips_comments(tmp_path):
    make(tmp_path / "data", "a.png", "b.png", "sub/c.png")
    (tmp_path / "data" / "list.txt").write_bytes(b"\xef\xbb\xbf# pictures\r\nsub/c.png\r\n\r\n  a.png  \r\n#b.png\r\na.png")
    source = open_source("list", list_file=str(tmp_path / "data" / "list.txt"))
    assert values(source) == [2, 0, 0]


def test_list_relative_to_a_root_or_absolute(tmp_path):
    make(tmp_path / "data", "a.png", "b.png")
    (tmp_path / "list.txt").write_text(f"b.png\n{tmp_path}/data/a.png\n")
    assert values(open_source("list", root=tmp_path / "data", list_file=tmp_path / "list.txt")) == [1, 0]


def test_list_with_blanks_and_labels(tmp_path):
    make(tmp_path, "plain.png", "with blank.png", "with", "tab.png", "two words.png", "labels/plain.png", "tab.png\tx")
    lines = {
        "with blank.png": 1,  # exists as a whole, although "with" exists as well
        "plain.png labels/plain.png": 0,
        "two words.png 17": 4,
        "tab.png\tlabels/plain.png": 3,
        "tab.png\tsome more words": 3,
        "with blank.png\t3": 1,
        "tab.png\tx": 6,
    }
    (tmp_path / "list.txt").write_text("\n".join([*lines, "missing file.png"]))
    source = ListSource(tmp_path / "list.txt")
    assert [int(source.picture(i)[0, 0, 0]) for i in range(7)] == list(lines.values())
    with pytest.raises(UndecodableError, match="missing file.png: No such file"):
        source.read(7)


def test_bad_lists(tmp_path):
    with refused("data.list_file", "not set"):
        open_source("list", root=tmp_path)
    with refused("data.list_file", "list.txt", "does not exist"):
        ListSource(tmp_path / "list.txt")
    with refused("data.list_file", "is a folder"):
        ListSource(tmp_path)
    (tmp_path / "list.txt").write_text("# nothing\n\n")
    with refused("data.list_file", "lists no pictures"):
        ListSource(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    with refused("data.list_file", "none of the first 2", tmp_path / "a.png", "data.root"):
        ListSource(tmp_path / "list.txt")
    with refused("data.root", "does not exist"):
        ListSource(tmp_path / "list.txt", tmp_path / "none")
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    with refused("data.list_file", "none of the first"):
        ListSource(tmp_path / "list.txt")


# COCO


def coco(path, *pairs):
    path.write_text(json.dumps({"images": [{"id": id_, "file_name": name} for id_, name in pairs], "annotations": []}))
    return path


def test_coco_lists_by_ascending_id(tmp_path):
    make(tmp_path / "train", "a.png", "b.png", "sub/c.png")
    annotation = coco(tmp_path / "c.json", (9, "a.png"), (10, "sub/c.png"), (1, "b.png"))
    source = open_source("coco", root=tmp_path / "train", annotation=annotation)
    assert values(source) == [1, 0, 2]
    assert names(open_source("coco", root=tmp_path / "train")) == names(FolderSource(tmp_path / "train"))


def test_bad_coco(tmp_path):
    make(tmp_path, "a.png")
    path = tmp_path / "c.json"
    with refused("data.annotation", path, "does not exist"):
        CocoSource(tmp_path, path)
    for text in ("{", "\xff"):
        path.write_text(text, encoding="latin-1")
        with refused("data.annotation", path, "JSON"):
            CocoSource(tmp_path, path)
    for text in ("{}", "[]", "3", '{"images": 5}', '{"images": [{"id": 1}]}', '{"images": [{"id": 1, "file_name": 2}]}'):
        path.write_text(text)
        with refused("data.annotation", path, '"images"'):
            CocoSource(tmp_path, path)
    coco(path)
    with refused("data.annotation", "empty"):
        CocoSource(tmp_path, path)
    coco(path, (1, "other.png"))
    with refused("data.annotation", "other.png", "data.root"):
        CocoSource(tmp_path, path)
    coco(path, (1, "a.png"))
    with refused("data.root", "not set"):
        CocoSource(None, path)


# LMDB


def test_lmdb_sorts_keys_and_skips_meta(tmp_path):
    make_lmdb(tmp_path / "db", {b"b": png(1), b"a/x.jpg": png(0), b"__meta__/count": b"3", b"\xff": png(2)})
    source = open_source("lmdb", root=str(tmp_path / "db"))
    assert values(source) == [0, 1, 2]
    assert names(source) == [f"{tmp_path}/db!a/x.jpg", f"{tmp_path}/db!b", f"{tmp_path}/db!\\xff"]
    assert values(LmdbSource(tmp_path / "db" / "data.mdb")) == [0, 1, 2]  # the file itself


def test_lmdb_after_a_fork_and_twice_in_a_process(tmp_path):
    make_lmdb(tmp_path / "db", {b"a": png(11), b"b": png(22)})
    source, again = LmdbSource(tmp_path / "db"), LmdbSource(tmp_path / "db")
    assert source.picture(0)[0, 0, 0] == 11  # opened here: the child must not use this environment
    assert in_a_fork(lambda: int(source.picture(1)[0, 0, 0])) == 22
    assert in_a_fork(lambda: int(again.picture(1)[0, 0, 0])) == 22
    assert in_a_fork(lambda: len(again.read(0)) and _lmdb_environments[again._file][0] == os.getpid()) == 1
    assert again.picture(1)[0, 0, 0] == 22 and source.picture(0)[0, 0, 0] == 11
    assert pickle.loads(pickle.dumps(source)).picture(0)[0, 0, 0] == 11


def test_lmdb_on_a_read_only_disk(tmp_path):
    make_lmdb(tmp_path / "db", {b"a": png(1)})
    (tmp_path / "db" / "lock.mdb").unlink()
    assert len(LmdbSource(tmp_path / "db")) == 1
    assert os.listdir(tmp_path / "db") == ["data.mdb"]  # nothing is written next to the data


def test_bad_lmdb(tmp_path):
    with refused("data.root", "does not exist"):
        LmdbSource(tmp_path / "none")
    with refused("data.root", tmp_path, "LMDB", "No such file"):
        LmdbSource(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"nonsense" * 1000)
    with refused("data.root", tmp_path, "not an LMDB file"):
        LmdbSource(tmp_path)
    make_lmdb(tmp_path / "empty", {b"__meta__": b""})
    with refused("data.root", tmp_path / "empty", "empty LMDB"):
        LmdbSource(tmp_path / "empty")


# Archives

ITEMS = {
    "b/two.PNG": png(2),
    "a/one.png": png(1),
    "../evil.png": png(0),
    "./c.jpg": png(3),
    "readme.txt": b"text",
    "__MACOSX/._a.png": b"not a picture",
    ".git/x.png": b"hidden",
}


def make_archive(kind, folder):
    if kind == "tar":
        return make_tar(folder / "data.tar", ITEMS)
    return make_zip(folder / "data.zip", ITEMS, zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("kind", ["tar", "stored", "deflated"])
def test_archive(kind, tmp_path):
    path = make_archive(kind, tmp_path)
    source = open_source("archive", root=str(path))
    order = ["../evil.png", "./c.jpg", "a/one.png", "b/two.PNG"]
    assert names(source) == [f"{path}!{name}" for name in order]
    assert [source.read(i) for i in range(4)] == [ITEMS[name] for name in order]
    assert values(source) == [0, 3, 1, 2]
    assert in_a_fork(lambda: values(source)[3]) == 2
    assert pickle.loads(pickle.dumps(source)).read(2) == ITEMS["a/one.png"]
    assert sorted(os.listdir(tmp_path)) == [path.name]  # nothing was unpacked


@pytest.mark.parametrize("make_some", [make_tar, make_zip])
def test_archive_of_many_members_with_long_names(make_some, tmp_path):
    items = {f"{'long' * 40}/{i:04d}/ü.png": png(i % 256) for i in range(500)}
    source = ArchiveSource(make_some(tmp_path / "data", items))
    assert [source.name(i).partition("!")[2] for i in range(500)] == sorted(items)
    assert values(source) == [i % 256 for i in range(500)]


def test_last_member_of_a_name_counts(tmp_path):
    make_tar(tmp_path / "data.tar", {"a.png": png(1), "b.png": png(2)})
    make_tar(tmp_path / "data.tar", {"a.png": png(3)}, "a")
    assert values(ArchiveSource(tmp_path / "data.tar")) == [3, 2]


def test_damaged_members_are_undecodable(tmp_path):
    for kind in ("tar", "stored", "deflated"):
        path = make_archive(kind, tmp_path)
        source = ArchiveSource(path)
        whole = path.read_bytes()
        if kind != "tar":  # which has no checksum over the data
            index = source._index[2]
            data = bytearray(whole)
            data[int(index[0]) + 30 + len("a/one.png") + 20] ^= 255
            path.write_bytes(data)
            with pytest.raises(UndecodableError, match="damaged in the archive"):
                source.read(2)
        path.write_bytes(whole[:100])
        with pytest.raises(UndecodableError):
            source.read(3)
        path.unlink()
        with pytest.raises(UndecodableError, match="No such file"):
            source.read(3)


def test_bad_archives(tmp_path):
    with refused("data.root", "does not exist"):
        ArchiveSource(tmp_path / "none.zip")
    with refused("data.root", "is a folder"):
        ArchiveSource(tmp_path)
    for mode in ("gz", "bz2", "xz"):
        make_tar(tmp_path / "data.tgz", ITEMS, f"w:{mode}")
        with refused("data.root", "data.tgz", "compressed", "gunzip"):
            ArchiveSource(tmp_path / "data.tgz")
    for content in (b"", b"nonsense" * 500, make_archive("tar", tmp_path).read_bytes()[:1600],
                    make_archive("stored", tmp_path).read_bytes()[:-30]):  # fmt: skip
        (tmp_path / "bad.zip").write_bytes(content)
        with refused("data.root", "bad.zip", "complete"):
            ArchiveSource(tmp_path / "bad.zip")
    for make_some in (make_tar, make_zip):
        with refused("data.root", "no pictures", ".jpeg"):
            ArchiveSource(make_some(tmp_path / "data", {"readme.txt": b"text"}))
    with refused("data.root", "a.png is packed by method 14"):
        ArchiveSource(make_zip(tmp_path / "lzma.zip", {"a.png": png(1)}, zipfile.ZIP_LZMA))
    content = bytearray(make_zip(tmp_path / "locked.zip", {"a.png": png(1)}).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "locked.zip").write_bytes(content)
    with refused("data.root", "encrypted"):
        ArchiveSource(tmp_path / "locked.zip")


# The function that opens them


def test_open_source():
    source = open_source("synthetic", synthetic_count=3, seed=5, root="/ignored")
    assert isinstance(source, SyntheticSource) and len(source) == 3
    assert (source.picture(0) == SyntheticSource(3, 5).picture(0)).all()
    with refused("data.source", "'web'", "folder"):
        open_source("web")


def test_order_does_not_depend_on_the_process(tmp_path):
    make(tmp_path, *(f"{i % 7}/{i}.jpg" for i in range(60)))
    code = "import sys; from ppdensecl.data.sources import *; print(FolderSource(sys.argv[1]).fingerprint())"
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "LC_ALL": "C"}
        run = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == FolderSource(tmp_path).fingerprint(), run.stderr
