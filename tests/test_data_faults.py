"""Faults of the data while a run reads it: broken and vanished pictures, folders that may not be read, workers that die or stop.

Nothing may hang: every wait here has an end.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from ppdensecl.data import source as source_module
from ppdensecl.data import worker as worker_module
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.sources import ArchiveSource, CocoSource, FolderSource, ListSource, LmdbSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "model.stages=1", "model.queue_len=16", "model.hidden_dim=8",
        "model.embedding_dim=8", "data.image_size=32", "data.batch_size=4", "log.interval=1", "log.visualdl=false"]
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


def _pictures(folder, count, broken=()):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        data = cv2.imencode(".jpg", rng.integers(0, 256, (36, 40, 3), dtype=np.uint8))[1].tobytes()
        (folder / f"{i:03d}.jpg").write_bytes(data[:len(data) // 2] if i in broken else data)
    return folder


@contextlib.contextmanager
def _run(folder, *overrides):
    """A run of tools/train.py, killed after two minutes at the latest, with all that it left."""
    process = subprocess.Popen([sys.executable, "tools/train.py", *TINY, f"output_dir={folder}", *map(str, overrides)], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env={**os.environ, "PPDENSECL_CPU_THREADS": "1"})
    watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _until(process, pattern):
    """Reads the log up to a line with `pattern`."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    pytest.fail(f"the run ended without {pattern}")


def _last_sentence(process, expected_status=1):
    lines = process.stdout.read().splitlines()
    assert process.wait() == expected_status, lines[-10:]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pids):
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "Z"
    return [pid for pid in pids if state(pid) != "Z"]


def _gone(pids):
    for _ in range(200):
        if not _alive(pids):
            return True
        time.sleep(0.05)


def test_one_picture_in_a_hundred_is_broken(tmp_path):
    root = _pictures(tmp_path / "p", 300, broken=(7, 77, 277))
    with _run(tmp_path / "run", f"data.root={root}", "data.source=folder", "data.workers=2", "optim.epochs=2") as process:
        output = process.stdout.read()
        assert process.wait() == 0, output[-2000:]
    told = re.findall(r"cannot decode (\S+) \((.+)\); another picture stands in for it \((\d) so far\)", output)
    assert sorted(name for name, _, _ in told) == [str(root / f"{i:03d}.jpg") for i in (7, 77, 277)]
    assert [count for _, _, count in told] == ["1", "2", "3"]
    assert {reason for _, reason, _ in told} == {"the JPEG data is cut short"}
    assert json.loads((tmp_path / "run/latest.pdstates").read_text())["iteration"] == 150


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_vanish_while_the_run_reads_them(tmp_path, workers):
    """Two of 300 are replaced and named; then the whole folder goes, as when a disk is unmounted, and the run ends."""
    root = _pictures(tmp_path / "p", 300)
    with _run(tmp_path / "run", f"data.root={root}", "data.source=folder", f"data.workers={workers}", "optim.epochs=100000",
              "save.interval_iters=20") as process:
        _until(process, "iter: 2/")
        for number in (123, 234):
            (root / f"{number}.jpg").unlink()
        for number in (1, 2):
            assert "(No such file or directory)" in _until(process, f"cannot decode .*/(123|234).jpg .*{number} so far")
        _until(process, "iter: 1/")
        _until(process, "iter: 30/")
        shutil.move(root, tmp_path / "elsewhere")
        sentence = _last_sentence(process)
    assert re.search(r"\d+ of 300 pictures cannot be decoded, more than data.max_bad_fraction allows", sentence), sentence
    assert len(sentence) < 2000
    assert checkpoint.newest(tmp_path / "run")[1]["iteration"] >= 20


@LINUX
def test_a_killed_worker_ends_the_run_and_resuming_gives_the_same_weights(tmp_path, run_tool):
    """As the kernel does when memory is short."""
    common = ["data.synthetic_count=40", "data.workers=2", "optim.epochs=6", "save.interval_iters=5"]
    with _run(tmp_path / "run", *common) as process:
        _until(process, "iter: 7/")
        workers = _children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        sentence = _last_sentence(process)
        assert re.search(rf"data worker 1 \(process {workers[1]}\) was killed by signal 9 .*memory.*--resume", sentence), sentence
        assert _gone(workers)
    common = [*TINY, *common]
    assert run_tool("train.py", *common, f"output_dir={tmp_path / 'run'}", "--resume").returncode == 0
    assert run_tool("train.py", *common, f"output_dir={tmp_path / 'whole'}").returncode == 0
    resumed, whole = (checkpoint.load_weights(tmp_path / name / "latest") for name in ("run", "whole"))
    assert resumed.keys() == whole.keys() and all((resumed[name] == whole[name]).all() for name in whole)


@LINUX
def test_a_killed_run_leaves_neither_processes_nor_shared_memory(tmp_path):
    before = set(os.listdir("/dev/shm"))
    with _run(tmp_path / "run", "data.synthetic_count=40", "data.workers=3", "optim.epochs=100000") as process:
        _until(process, "iter: 3/")
        workers = _children(process.pid)
        assert len(workers) == 3 and _alive(workers) == workers
        mapped = {entry for entry in os.listdir("/dev/shm") if entry not in before}
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert _gone(workers), "workers outlived the training process"
    assert not mapped & set(os.listdir("/dev/shm"))


def _loader(**options):
    return PairLoader(SyntheticSource(40), Augmentation(size=(32, 32)), **{**dict(batch_size=4, seed=1), **options})


@LINUX
def test_a_stopped_worker_is_named_and_the_run_goes_on_when_it_does(monkeypatch, caplog):
    monkeypatch.setattr(worker_module, "PATIENCE", 0.2)
    monkeypatch.setattr(logging.getLogger("ppdensecl"), "propagate", True)
    loader = _loader(workers=2)
    stopped = loader._workers[1].process.pid
    woken = threading.Timer(1, os.kill, (stopped, signal.SIGCONT))
    try:
        found = []
        for number, batch in enumerate(loader.batches(range(12))):
            found.append(batch.copy())
            if number == 2:
                os.kill(stopped, signal.SIGSTOP)
                woken.start()
    finally:
        woken.join(5)
        loader.close()
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told and all(f"data worker 1 (process {stopped}) has made no batch for " in line for line in told), told
    assert "stopped; `kill -CONT` lets it go on" in told[0]
    assert all((batch == other).all() for batch, other in zip(found, _loader().batches(range(12))))


@LINUX
def test_a_stopped_worker_does_not_keep_the_run_from_ending():
    loader = _loader(workers=2)
    workers = [worker.process.pid for worker in loader._workers]
    os.kill(workers[0], signal.SIGSTOP)
    started = time.time()
    loader.close()
    assert time.time() - started < 10 and not _alive(workers)


def _as_nobody(call):
    """What `call` returns in a process without root's rights, to whom permissions apply."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no answer"
        with contextlib.suppress(BaseException):
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            try:
                text = str(call())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def open_folder():
    """A folder that another user can reach: pytest's own are its user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_folders_and_files_that_may_not_be_read(open_folder):
    root = _pictures(open_folder / "p", 5)
    (root / "locked").mkdir(mode=0o000)
    message = _as_nobody(lambda: FolderSource(str(root)))
    assert message.startswith("UserError: ") and f"{root}/locked cannot be read: Permission denied" in message
    (root / "locked").rmdir()
    source = FolderSource(str(root))
    (root / "002.jpg").chmod(0)
    assert _as_nobody(lambda: source.picture(2)) == f"UndecodableError: {root}/002.jpg: Permission denied"
    assert _as_nobody(lambda: source.picture(1).shape) == "(36, 40, 3)"
    with lmdb.open(str(open_folder / "db"), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        transaction.put(b"a", b"b")
    files = {"list.txt": lambda path: ListSource(path, str(root)), "coco.json": lambda path: CocoSource(str(root), path),
             "pictures.tar": ArchiveSource, "db/data.mdb": LmdbSource}
    for name, opened in files.items():
        path = open_folder / name
        path.touch()
        path.chmod(0)
        message = _as_nobody(lambda: opened(str(path)))
        assert message.startswith("UserError: data.") and "ermission denied" in message and str(path) in message, message


def test_what_is_named_like_a_picture_and_is_none(tmp_path):
    """A named pipe would wait for a writer, a device never ends, a huge file would not fit into the memory."""
    root = _pictures(tmp_path / "p", 1)
    os.mkfifo(root / "pipe.jpg")
    os.symlink("/dev/zero", root / "device.jpg")
    (root / "folder.jpg").mkdir()
    with open(root / "huge.jpg", "wb") as file:
        file.truncate(200 << 30)
    (tmp_path / "list").write_text("000.jpg\npipe.jpg\ndevice.jpg\nfolder.jpg\nhuge.jpg\n")
    source = ListSource(str(tmp_path / "list"), str(root))
    reasons = {1: "not a regular file", 2: "not a regular file", 3: "Is a directory", 4: "214.7 GB are more"}
    signal.alarm(20)  # ends the process where one of them waits
    for i, reason in reasons.items():
        with pytest.raises(UndecodableError, match=reason):
            source.picture(i)
    signal.alarm(0)
    assert source.picture(0).shape == (36, 40, 3)


def test_an_archives_member_may_be_no_larger_than_a_picture(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(100_000))
    source = ArchiveSource(str(tmp_path / "a.zip"))
    with pytest.raises(UndecodableError, match="not a picture"):
        source.picture(0)
    monkeypatch.setattr(source_module, "MAX_BYTES", 50_000)
    with pytest.raises(UndecodableError, match="more than any picture has"):
        source.picture(0)


def test_a_removed_folder_is_one_sentence_at_the_start(tmp_path):
    with pytest.raises(UserError, match="data.root: .*p does not exist"):
        FolderSource(str(tmp_path / "p"))
    source = FolderSource(str(_pictures(tmp_path / "p", 20)))
    shutil.rmtree(tmp_path / "p")
    with pytest.raises(UserError, match="of 20 pictures cannot be decoded"):
        loader = PairLoader(source, Augmentation(size=(32, 32)), batch_size=4)
        list(loader.batches([0]))
