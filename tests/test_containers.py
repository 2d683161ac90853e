"""LMDBs and archives: what they find, in which order, that they survive a fork, and what they say about bad input."""

import io
import os
import pickle
import tarfile
import zipfile

import lmdb
import pytest

from ppdensecl.data.containers import ArchiveSource, LmdbSource, _lmdb_environments
from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.sources import open_source
from test_sources import names, png, refused, values


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
