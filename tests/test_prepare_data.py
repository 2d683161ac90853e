"""The cache: the same pictures in the same order, whatever interrupts it, and one sentence for what cannot be."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

import lmdb
import numpy as np
import pytest

from ppdensecl.data import cache
from ppdensecl.data.containers import LmdbSource, close_lmdb
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.picture import decode
from ppdensecl.data.sources import FolderSource, ListSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from test_containers import make_lmdb
from test_sources import refused

ROOT = Path(__file__).resolve().parent.parent


def picture(seed, height=40, width=60):
    """Smooth, so that JPEG hardly changes it; top left is dark, bottom right is light."""
    y, x = np.mgrid[:height, :width]
    tone = 20 + 200 * (y / height + x / width) / 2
    return np.stack([tone, tone[::-1], np.full_like(tone, 7 * seed % 256)], axis=2).astype(np.uint8)


def encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def folder(path, count, height=40, width=60, broken=()):
    path.mkdir()
    for i in range(count):
        (path / f"{i:03d}.jpg").write_bytes(b"broken" if i in broken else encoded(picture(i, height, width)))
    return FolderSource(str(path))


def records(path):
    """[(key, value)] of the pictures in an LMDB, read by nothing of ours."""
    close_lmdb(str(path))
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment, environment.begin() as transaction:
        return [item for item in transaction.cursor() if not item[0].startswith(b"__meta__")]


def files(path):
    return sorted(entry.name for entry in path.iterdir() if not entry.is_dir())


# What it holds


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_and_order_are_the_sources(tmp_path, workers):
    names = ["b.png", "a/ü.jpg", "c.gif", f"{'long' * 55}/{'er' * 100}/{'name' * 50}.jpg", "a/0.bmp"]
    names += [f"{i}.jpg" for i in range(30)]
    kinds = {".png": "PNG", ".gif": "GIF", ".bmp": "BMP", ".jpg": "JPEG"}
    for i, name in enumerate(names):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(encoded(picture(i), kinds[name[-4:]]))
    (tmp_path / "list").write_text("\n".join(names))
    source = ListSource(str(tmp_path / "list"), str(tmp_path / "p"))  # in no sorted order
    done = cache.prepare(source, tmp_path / "c.lmdb", workers=workers)
    made = LmdbSource(tmp_path / "c.lmdb")
    assert [made.read(i) for i in range(len(made))] == [(tmp_path / "p" / name).read_bytes() for name in names]
    assert made.name(1) == f"{tmp_path}/c.lmdb!000000001/a/ü.jpg" and made.name(3).endswith("name.jpg")
    total = sum((tmp_path / "p" / name).stat().st_size for name in names)
    assert (done.pictures, done.reduced, done.bad, done.bytes_before, done.resumed) == (len(names), 0, [], total, 0)
    assert done.bytes_after == (tmp_path / "c.lmdb").stat().st_size and files(tmp_path) == ["c.lmdb", "list"]


def test_any_source_may_be_cached(tmp_path):
    source = SyntheticSource(5)
    cache.prepare(source, tmp_path / "a.lmdb")
    cache.prepare(LmdbSource(tmp_path / "a.lmdb"), tmp_path / "b.lmdb")
    assert [value for _, value in records(tmp_path / "b.lmdb")] == [source.read(i) for i in range(5)]


def test_large_pictures_are_reduced_upright_and_others_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = {"0.jpg": encoded(picture(0, 200, 301)), "1.jpg": encoded(picture(1, 60, 300)),
              "2.png": encoded(picture(2, 64, 64), "PNG"), "3.png": encoded(picture(3, 150, 129), "PNG"),
              "4.jpg": encoded(picture(4, 200, 300), exif=exif), "5.jpg": encoded(picture(5, 64, 400), exif=exif)}
    for name, data in stored.items():
        (tmp_path / name).write_bytes(data)
    source = FolderSource(str(tmp_path))
    done = cache.prepare(source, tmp_path / "c.lmdb", short_side=64, quality=90)
    made = LmdbSource(tmp_path / "c.lmdb")
    kept = {1, 2, 5}
    sizes = [(64, 96), (60, 300), (64, 64), (74, 64), (96, 64), (400, 64)]
    assert done.reduced == 3 and [made.picture(i).shape[:2] for i in range(6)] == sizes
    for i, data in enumerate(stored.values()):
        assert (made.read(i) == data) == (i in kept), i
        assert made.read(i)[:2] == b"\xff\xd8" or i in kept
        whole = source.picture(i)
        expected = np.asarray(Image.fromarray(whole).resize(sizes[i][::-1], Image.BICUBIC)).astype(int)
        assert np.abs(made.picture(i) - expected).mean() < 2, i
    assert decode(made.read(4), "")[-1, 0].mean() > decode(made.read(4), "")[0, -1].mean()  # it was turned
    worse = cache.prepare(source, tmp_path / "worse.lmdb", short_side=64, quality=10)
    assert len(records(tmp_path / "worse.lmdb")[0][1]) < len(made.read(0)) and worse.reduced == 3


def test_a_picture_longer_than_a_jpeg_may_be_is_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(np.zeros((40, 70000, 3), np.uint8), "PNG"))
    cache.prepare(FolderSource(str(tmp_path)), tmp_path / "c.lmdb", short_side=39)
    assert LmdbSource(tmp_path / "c.lmdb").picture(0).shape == (40, 70000, 3)


def test_the_map_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAP_SIZE", 1 << 14)
    monkeypatch.setattr(cache, "COMMIT_PICTURES", 10)
    source = folder(tmp_path / "p", 100, 100, 150)
    done = cache.prepare(source, tmp_path / "c.lmdb")
    assert done.bytes_after > 8 << 14
    assert [value for _, value in records(tmp_path / "c.lmdb")] == [source.read(i) for i in range(100)]


def test_training_sees_what_it_saw(tmp_path):
    source = folder(tmp_path / "p", 12)
    cache.prepare(source, tmp_path / "c.lmdb", workers=2)
    batches = []
    for each, workers in ((source, 0), (LmdbSource(tmp_path / "c.lmdb"), 0), (LmdbSource(tmp_path / "c.lmdb"), 2)):
        loader = PairLoader(each, Augmentation(size=(32, 32)), batch_size=4, seed=3, workers=workers)
        batches.append([batch.copy() for batch in loader.batches(range(6))])
        loader.close()
    assert np.array_equal(batches[0], batches[1]) and np.array_equal(batches[0], batches[2])


# Interrupted

SLOW = ("import sys; from ppdensecl.data import cache; from ppdensecl.data.sources import FolderSource\n"
        "cache.COMMIT_PICTURES = 5; print('ready', flush=True)\n"
        "print(cache.prepare(FolderSource(sys.argv[1]), sys.argv[2], short_side=64, workers=2).resumed)")


def slow(*arguments):
    """A process that prepares in small transactions; it has said "ready"."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_at_any_moment_it_goes_on(tmp_path):
    source = folder(tmp_path / "p", 150, 500, 700, broken=(40,))
    whole, output = tmp_path / "whole.lmdb", tmp_path / "c.lmdb"
    began = time.monotonic()
    process = slow(tmp_path / "p", whole)
    assert process.communicate()[0] == "0\n" and process.returncode == 0
    seconds, rng, resumed = time.monotonic() - began, random.Random(0), []
    workers = set()
    for attempt in range(40):
        process = slow(tmp_path / "p", output)
        time.sleep(rng.uniform(0, seconds / 8 * (1 + attempt / 5)))  # longer and longer: the machine may have become slower
        workers.update(children(process.pid))
        process.kill()
        process.wait()
        if output.exists():
            break
        if not Path(f"{output}.partial").exists():
            continue
        with lmdb.open(f"{output}.partial", subdir=False, readonly=True, lock=False) as environment:
            with environment.begin() as transaction:
                resumed.append(json.loads(transaction.get(b"__meta__", b'{"pictures": 0}'))["pictures"])
        if len(set(resumed) - {0}) > 3:
            break
    assert len(set(resumed) - {0}) > 2 and resumed == sorted(resumed), resumed
    process = slow(tmp_path / "p", output)
    assert process.communicate()[0] == f"{resumed[-1]}\n"
    assert records(output) == records(whole) and len(records(whole)) == 149
    assert files(tmp_path) == ["c.lmdb", "c.lmdb.bad.txt", "whole.lmdb", "whole.lmdb.bad.txt"]
    assert len(source) == 150 and cache.prepare(source, output, short_side=64).bad[0][0].endswith("040.jpg")
    assert len(workers) > 4
    deadline = time.monotonic() + 10
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_tool_in_a_sentence(tmp_path, number):
    source = folder(tmp_path / "p", 200, 500, 700)
    command = ["tools/prepare_data.py", "lmdb", "--root", tmp_path / "p", "--output", tmp_path / "c.lmdb", "--short-side", "64",
               "--workers", "2"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 20
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for worker in children(process.pid):
        os.kill(int(worker), number)  # they leave it to their parent
    time.sleep(0.2)
    assert len(children(process.pid)) == 2 and all(map(alive, children(process.pid)))
    os.killpg(process.pid, number)  # as a terminal and a batch system do
    text = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number and text == "interrupted; the same command goes on where it was\n", text
    with refused("data.root", "c.lmdb.partial", "not finished", f"prepare_data.py lmdb --output {tmp_path / 'c.lmdb'}"):
        LmdbSource(tmp_path / "c.lmdb")
    with refused("not finished"):
        LmdbSource(tmp_path / "c.lmdb.partial")
    assert cache.prepare(source, tmp_path / "c.lmdb", short_side=64, workers=2).pictures == 200
    assert len(LmdbSource(tmp_path / "c.lmdb")) == 200


def test_killed_before_the_name_it_only_takes_the_name(tmp_path, monkeypatch):
    source = folder(tmp_path / "p", 3)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.prepare(source, tmp_path / "c.lmdb")
    (tmp_path / "p" / "000.jpg").unlink()  # not read any more
    assert cache.prepare(source, tmp_path / "c.lmdb").resumed == 3
    assert len(LmdbSource(tmp_path / "c.lmdb")) == 3


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, run_tool):
    source = folder(tmp_path / "p", 100, 300, 400)
    arguments = ["prepare_data.py", "lmdb", "--root", tmp_path / "p", "--output", tmp_path / "c.lmdb"]
    code = "import sys; sys.path.insert(0, 'tools'); sys.argv.pop(0); import prepare_data as tool, command_line\n"
    code += "from ppdensecl.data import cache; cache.COMMIT_PICTURES = 10; command_line.run(tool.main)"
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"error: {tmp_path / 'c.lmdb.partial'}: cannot be written") and "some space" in result.stderr
    result = run_tool(*arguments)
    assert result.returncode == 0 and "100 pictures (" in result.stdout and "were there before" in result.stdout, result
    assert [value for _, value in records(tmp_path / "c.lmdb")] == [source.read(i) for i in range(100)]


def test_a_killed_worker_is_a_sentence(tmp_path, monkeypatch):
    source = folder(tmp_path / "p", 40)
    parent, read = os.getpid(), FolderSource.read

    def fatal(self, i):
        if i == 30 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i)

    with monkeypatch.context() as patch, refused("worker (process", "status -9 (out of memory?)", "--workers"):
        patch.setattr(FolderSource, "read", fatal)
        cache.prepare(source, tmp_path / "c.lmdb", workers=2)
    assert cache.prepare(source, tmp_path / "c.lmdb", workers=2).pictures == 40


def test_a_fault_of_a_worker_shows_where(tmp_path, monkeypatch):
    source = folder(tmp_path / "p", 4)
    monkeypatch.setattr(FolderSource, "read", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="(?s)a worker failed.*ZeroDivisionError"):
        cache.prepare(source, tmp_path / "c.lmdb", workers=1)


def test_two_processes_do_not_write_one_file(tmp_path):
    source = folder(tmp_path / "p", 100, 500, 700)
    process = slow(tmp_path / "p", tmp_path / "c.lmdb")
    while not (tmp_path / "c.lmdb.partial").exists():
        time.sleep(0.01)
    with refused("c.lmdb.partial", "another process"):
        cache.prepare(source, tmp_path / "c.lmdb", short_side=64)
    assert process.communicate()[0] == "0\n" and len(LmdbSource(tmp_path / "c.lmdb")) == 100


# Refused


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused(tmp_path, monkeypatch, finished):
    source, output = folder(tmp_path / "p", 5), tmp_path / "c.lmdb"
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(cache, "_verify", lambda *_: 1 / 0)
        try:
            cache.prepare(source, output, short_side=32)
        except ZeroDivisionError:
            assert not output.exists()
    (tmp_path / "list").write_text("p/000.jpg\np/001.jpg")
    before = records(output if finished else f"{output}.partial")
    for other, options, words in (
            (source, {"short_side": 33}, "--short-side 32 (now 33)"), (source, {}, "--short-side 32 (now 0)"),
            (source, {"short_side": 32, "quality": 94}, "--quality 95 (now 94)"),
            (ListSource(str(tmp_path / "list")), {"short_side": 32}, "number of pictures 5 (now 2)"),
            (folder(tmp_path / "other", 6), {"short_side": 32}, "names of the pictures")):
        with refused(output, "made from something else", words, "--output"):
            cache.prepare(other, output, **options)
    assert records(output if finished else f"{output}.partial") == before
    moved = (tmp_path / "p").rename(tmp_path / "moved")
    assert cache.prepare(FolderSource(str(moved)), output, short_side=32, workers=1).resumed == 5


def test_bad_pictures_are_left_out_and_listed(tmp_path):
    source, output = folder(tmp_path / "p", 50, broken=(0, 7, 49)), tmp_path / "c.lmdb"
    with refused("3 of 50 pictures", "--max-bad-fraction 0.05", "007.jpg", f"{output}.bad.txt"):
        cache.prepare(source, output, workers=2, max_bad_fraction=0.05)
    assert not output.exists()
    (tmp_path / "p" / "007.jpg").write_bytes(encoded(picture(7)))  # repaired: it is tried again, at its place
    done = cache.prepare(source, output, workers=2, max_bad_fraction=0.05)
    assert [name for name, _ in done.bad] == [str(tmp_path / "p" / name) for name in ("000.jpg", "049.jpg")]
    listed = Path(f"{output}.bad.txt").read_text().splitlines()
    assert listed == [f"{tmp_path / 'p'}/{name}\tnot a picture of a known format" for name in ("000.jpg", "049.jpg")]
    made = LmdbSource(output)
    assert [made.read(i) for i in range(48)] == [source.read(i) for i in range(1, 49)]
    assert cache.prepare(source, output, max_bad_fraction=0.05).bad == done.bad


def test_nothing_but_bad_pictures(tmp_path):
    with refused("none of 3 pictures can be decoded", "--root"):
        cache.prepare(folder(tmp_path / "p", 3, broken=(0, 1, 2)), tmp_path / "c.lmdb", max_bad_fraction=1)
    assert not (tmp_path / "c.lmdb").exists()


@pytest.mark.parametrize("damage", ["a byte", "a record", "a checksum"])
def test_damage_is_found_by_reading_back(tmp_path, monkeypatch, damage):
    source, output, verify = folder(tmp_path / "p", 20), tmp_path / "c.lmdb", cache._verify

    def damaged(partial, *arguments):
        if damage == "a byte":
            data, value = bytearray(Path(partial).read_bytes()), source.read(13)
            data[data.index(value) + len(value) // 2] ^= 1
            Path(partial).write_bytes(data)
        else:
            with lmdb.open(partial, subdir=False, lock=False) as environment, environment.begin(write=True) as transaction:
                transaction.delete(b"000000013/013.jpg" if damage == "a record" else b"__meta__/crc32/000000000")
        verify(partial, *arguments)

    monkeypatch.setattr(cache, "_verify", damaged)
    number = 0 if damage == "a checksum" else 13
    with refused(f"{output}.partial", f"record of picture {number} is damaged", "delete the file"):
        cache.prepare(source, output)
    assert not output.exists()
    with refused("not finished"):
        LmdbSource(output)


def test_files_that_are_something_else(tmp_path):
    source = folder(tmp_path / "p", 2)
    make_lmdb(tmp_path / "foreign", {b"a": encoded(picture(0)), b"__meta__": b'{"count": 1}'})
    (tmp_path / "text").write_text("text")
    for path in (tmp_path / "text", tmp_path / "p", tmp_path / "foreign" / "data.mdb"):
        with refused(path, "is there already"):
            cache.prepare(source, path)
    assert (tmp_path / "text").read_text() == "text"
    (tmp_path / "c.lmdb.partial").write_bytes(b"nonsense" * 1000)
    with refused("c.lmdb.partial", "damaged", "delete it"):
        cache.prepare(source, tmp_path / "c.lmdb")
    (tmp_path / "foreign" / "data.mdb").rename(tmp_path / "d.lmdb.partial")
    with refused("d.lmdb.partial", "somebody else's"):
        cache.prepare(source, tmp_path / "d.lmdb")
    with refused("none/c.lmdb", "cannot be written", "--output"):
        cache.prepare(source, tmp_path / "none" / "c.lmdb")
    for number, content in enumerate((b'{"count": 1}', b"[1]", b"\xff", b"")):  # somebody else's are read as ever
        assert len(LmdbSource(make_lmdb(tmp_path / f"{number}", {b"a": encoded(picture(0)), b"__meta__": content}))) == 1


def test_the_tool(tmp_path, run_tool):
    folder(tmp_path / "p", 10, broken=(3,))
    arguments = ["prepare_data.py", "lmdb", "--root", tmp_path / "p", "--output", tmp_path / "c.lmdb", "--workers", "1"]
    for words, *more in (("--max-bad-fraction 0.01 allows", ), ("--root: /none does not exist", "--root", "/none"),
                         ("--list-file is not set", "--source", "list"), ("--short-side is -1", "--short-side", "-1"),
                         ("--quality is 0; it should be from 1 to 100", "--quality", "0"),
                         ("--max-bad-fraction is nan", "--max-bad-fraction", "nan")):
        result = run_tool(*arguments, *more)
        assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
        assert words in result.stderr, result.stderr
    for wrong in (["--annotation", "a.json"], ["--source", "web"], ["--workers", "x"]):
        assert run_tool(*arguments, *wrong).returncode == 2
    result = run_tool(*arguments, "--max-bad-fraction", "0.2", "--short-side", "32")
    assert result.returncode == 1 and "made from something else" in result.stderr
    result = run_tool(*arguments, "--max-bad-fraction", "0.2")
    assert result.returncode == 0 and "1 pictures cannot be decoded and were left out: " in result.stdout, result
    assert "c.lmdb: 9 pictures (9 were there before), 0 reduced, 0.000 GB -> 0.000 GB" in result.stdout and result.stderr == ""


def test_no_paddle_in_the_workers(tmp_path):
    code = "import sys; from ppdensecl.data import cache, sources; assert not [m for m in sys.modules if m.startswith('paddle')]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
