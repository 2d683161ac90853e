import os
import platform
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from ppdensecl.data.loader import PairLoader
from ppdensecl.data.sources import FolderSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.worker import Worker
from ppdensecl.errors import UserError

SMALL = Augmentation(size=(32, 48))


def _loader(source=None, **options):
    return PairLoader(source or SyntheticSource(10), SMALL, **{**dict(batch_size=3, seed=1), **options})


def _digest(loader, numbers):
    try:
        return [batch.copy() for batch in loader.batches(numbers)]
    finally:
        loader.close()


def test_views_are_the_same_for_any_number_of_workers_and_any_start():
    expected = _digest(_loader(), range(8))
    assert expected[0].shape == (2, 3, 32, 48, 3) and expected[0].dtype == np.uint8
    for workers in (1, 2, 3):
        for batch, other in zip(expected, _digest(_loader(workers=workers), range(8))):
            assert (batch == other).all()
    for batch, other in zip(expected[5:], _digest(_loader(workers=2), range(5, 8))):
        assert (batch == other).all()
    assert (expected[0] != expected[3]).any()


def test_every_sample_once_an_epoch_in_an_order_that_the_number_of_ranks_does_not_change():
    one = _loader(batch_size=4)
    assert len(one) == 2
    epochs = [np.concatenate([one.samples(epoch * 2 + i) for i in (0, 1)]) for epoch in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and (epochs[0] != epochs[1]).any()
    ranks = [_loader(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for batch in range(6):
        assert (np.concatenate([rank.samples(batch) for rank in ranks]) == one.samples(batch)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_an_unfinished_iteration_is_not_mixed_into_the_next(workers):
    loader = _loader(workers=workers)
    for batch in loader.batches(range(8)):
        break
    first = next(loader.batches([4])).copy()
    loader.close()
    assert (first == _digest(_loader(), [4])[0]).all()


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for():
    loader = _loader(workers=2)
    for batch in loader.batches(range(8)):
        before = batch.copy()
        time.sleep(0.05)  # the workers are done with all that they were asked for
        assert (batch == before).all()
    loader.close()


def _folder(path, good, bad):
    rng = np.random.default_rng(0)
    for i in range(good + bad):
        data = cv2.imencode(".png", rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))[1].tobytes()
        (path / f"{i:03d}.png").write_bytes(data if i >= bad else b"not a picture")
    return FolderSource(str(path))


def test_large_jpegs_are_decoded_only_as_large_as_needed(tmp_path, monkeypatch):
    """The same batches but for the finest detail, and a substitute's views are its own."""
    rng = np.random.default_rng(0)
    for i in range(6):
        picture = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (400 + 40 * i, 300), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), picture)
    (tmp_path / "3.jpg").write_bytes(b"not a picture")
    source, sizes = FolderSource(str(tmp_path)), []
    batches = []
    for reduced in (True, False):
        loader = _loader(source, batch_size=6, max_bad_fraction=0.5)
        picture = source.picture

        def noted(i, fewest):
            pixels = picture(i, fewest if reduced else lambda *size: fewest(*size) and size)
            sizes.append(len(pixels))
            return pixels

        monkeypatch.setattr(source, "picture", noted)
        batches.append(next(loader.batches(range(1))).astype(float))
        monkeypatch.undo()
    assert set(sizes) <= {300, 150, 75, 38} and len(set(sizes)) > 1
    assert np.abs(batches[0] - batches[1]).mean() < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_replaced_counted_and_named(tmp_path, workers):
    told = []
    loader = _loader(_folder(tmp_path, 19, 1), batch_size=5, workers=workers, max_bad_fraction=0.05,
                     on_bad=lambda *what: told.append(what))
    batches = _digest(loader, range(8))  # two epochs
    assert len(told) == 1 and "000.png" in told[0][0] and told[0][1] and told[0][2] == 1
    assert all(np.ptp(batch) > 0 for batch in batches)
    again = _digest(_loader(FolderSource(str(tmp_path)), batch_size=5, max_bad_fraction=0.05), range(8))
    assert all((a == b).all() for a, b in zip(batches, again))


@pytest.mark.parametrize("good, bad", [(18, 2), (0, 20)])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_pictures_end_the_run_with_their_names(tmp_path, workers, good, bad):
    with pytest.raises(UserError, match=r"of 20 pictures cannot be decoded.*0\d\d\.png.*data.max_bad_fraction"):
        _digest(_loader(_folder(tmp_path, good, bad), batch_size=10, workers=workers, max_bad_fraction=0.05), range(4))


def test_fewer_pictures_than_a_batch():
    with pytest.raises(UserError, match="data.batch_size.*only 10"):
        _loader(batch_size=11)


def test_a_killed_worker_is_one_sentence_and_no_hang():
    loader = _loader(SyntheticSource(200), workers=2)
    started = time.time()
    with pytest.raises(UserError, match="data worker 1 .* was killed by signal 9 .*data.workers"):
        for number, _ in enumerate(loader.batches(range(60))):
            if number == 3:
                os.kill(loader._workers[1].process.pid, signal.SIGKILL)
    loader.close()
    assert time.time() - started < 20


def test_a_fault_in_a_worker_shows_where(monkeypatch):
    source = SyntheticSource(10)
    monkeypatch.setattr(source, "picture", lambda index, fewest: 1 / 0)
    with pytest.raises(RuntimeError, match="(?s)data worker 0 failed.*ZeroDivisionError"):
        _digest(_loader(source, workers=1), range(2))


def test_a_worker_uses_one_thread():
    worker = Worker(lambda _: cv2.getNumThreads(), "worker", "")
    worker.ask(None)
    assert worker.receive() == 1
    worker.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_a_settled_process_keeps_its_memory():
    code = """if True:
        import os, resource, sys
        import numpy as np
        from ppdensecl.data.worker import settle
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
        if sys.argv[1] == "settled":
            settle()
        before = resident()
        views = [np.ones(2**20, np.uint8) for _ in range(20)]
        del views
        print(resident() - before)"""
    kept = [int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
            for how in ("settled", "as it is")]
    assert kept[0] >= 18 and kept[1] <= 5


def test_workers_leave_when_the_training_process_is_killed():
    pid = os.fork()
    if pid == 0:  # a process that starts workers and is killed
        loader = _loader(workers=2)
        with open(f"/tmp/ppdensecl_workers_{os.getpid()}", "w") as file:
            file.write(" ".join(str(worker.process.pid) for worker in loader._workers))
        time.sleep(60)
        os._exit(0)
    note = f"/tmp/ppdensecl_workers_{pid}"
    try:
        for _ in range(100):
            if os.path.exists(note) and len(open(note).read().split()) == 2:
                break
            time.sleep(0.05)
        workers = [int(p) for p in open(note).read().split()]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for _ in range(100):
            alive = [worker for worker in workers if os.path.exists(f"/proc/{worker}/stat")
                     and open(f"/proc/{worker}/stat").read().split()[2] != "Z"]
            if not alive:
                return
            time.sleep(0.05)
        pytest.fail(f"workers {alive} outlived the training process")
    finally:
        os.unlink(note)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_process_that_forgets_its_workers_ends_with_them_at_once():
    """Python sends them SIGTERM, which they leave to the training process, and waits for them; they must be gone by then."""
    code = """if True:
        from ppdensecl.data.loader import PairLoader
        from ppdensecl.data.synthetic import SyntheticSource
        from ppdensecl.data.transforms import Augmentation
        def loader():
            return PairLoader(SyntheticSource(10), Augmentation(size=(32, 32)), 2, workers=2)
        forgotten, kept, also_kept = loader(), loader(), loader()
        print(*[worker.process.pid for each in (forgotten, kept, also_kept) for worker in each._workers], flush=True)
        del forgotten
        first = next(kept.batches(range(9)))
        input()"""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        states = _states(workers[2:])
        assert len(states) == 4 and "Z" not in states
        for worker in workers[2:]:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        assert len(_states(workers)) == len(_states(workers[2:])) == 4  # the forgotten ones are gone, the signals ignored
        process.communicate("\n", timeout=20)
        assert process.returncode == 0 and not _states(workers)
    finally:
        process.kill()
        process.wait()


def _states(pids):
    """Of the processes that run, by /proc."""
    return [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] for pid in pids if os.path.exists(f"/proc/{pid}/stat")]
