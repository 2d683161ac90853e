"""What may happen to a run: signals, ranks that die, a full disk, damaged checkpoints. Long campaigns: tests/reliability."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "reliability"))
import damage  # noqa: E402
import disk_full  # noqa: E402
import kill  # noqa: E402
from tiny_run import alive, descendants, logged_iterations, newest_iteration, ranks, run, same, start, wait_until  # noqa: E402

from ppdensecl import parallel  # noqa: E402
from ppdensecl.engine import checkpoint, stopping  # noqa: E402

# No checkpoint but those that a signal asks for, and the last.
RARELY = ("optim.max_iters=30", "save.interval_epochs=1000000")
TWO = ("optim.max_iters=150", "save.interval_epochs=1000000")  # ranks agree once a second, which is some 30 iterations


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability") / "one"
    result = run(folder, overrides=RARELY)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability") / "two"
    result = run(folder, overrides=TWO, processes=2)
    assert result.returncode == 0, result.stdout
    return folder


def _ends(process, family, within):
    """The seconds until all of a run's processes are gone."""
    begun = time.monotonic()
    process.wait(within)
    wait_until(lambda: not any(map(alive, family)), within)
    return time.monotonic() - begun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_resume_goes_on(undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, overrides=RARELY)
    wait_until(lambda: logged_iterations(folder) >= 5)
    family = [process.pid, *descendants(process.pid)]
    # A terminal or a batch system sends it to all processes; the data worker has to live as long as batches are needed.
    os.kill(family[1], number)
    wait_until(lambda: logged_iterations(folder) >= 15)
    os.killpg(process.pid, number)
    _ends(process, family, 60)
    stopped = newest_iteration(folder)
    assert process.returncode == 128 + number and 15 <= stopped < 30
    words = f"stopped by {number.name} after iteration {stopped} of 30, with a checkpoint; go on with --resume"
    assert words in (folder / "train.log").read_text()
    assert logged_iterations(folder) == stopped
    resumed = run(folder, "--resume", overrides=RARELY)
    assert resumed.returncode == 0 and f"at iteration {stopped}" in resumed.stdout, resumed.stderr
    assert same(folder, undisturbed)


def test_a_signal_before_the_first_iteration_ends_at_once(tmp_path):
    process = start(tmp_path / "run", overrides=(*RARELY, "data.synthetic_count=1000000"))
    wait_until(lambda: (tmp_path / "run" / "train.log").exists())
    family = [process.pid, *descendants(process.pid)]
    process.terminate()
    _ends(process, family, 60)
    output = Path(f"{tmp_path / 'run'}.out").read_text()
    assert process.returncode in (143, -signal.SIGTERM) and "Traceback" not in output and not list(tmp_path.glob("run/*.pd*"))


def test_signals_close_together_are_one_request_and_a_later_one_ends_at_once(monkeypatch):
    assert stopping.SAME_REQUEST >= 1  # the launcher's three take 0.4 s, more on a busy machine
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.3)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with stopping.StopRequest() as request:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            if request.agreed() != signal.SIGTERM:
                os._exit(1)
            time.sleep(0.4)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        os._exit(2)
    status = os.waitpid(child, 0)[1]
    # Ended by the signal itself: a shell shows that as 143, too.
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_the_handlers_from_before_are_back_after_a_run():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.StopRequest():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_ranks_agree_seldom_and_on_the_same_iteration(monkeypatch):
    """Two ranks, one after the other in one process: what each sent is what the other gets."""
    import paddle

    now, other = [0.0], [0.0, 0.0]
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    exchanges = []

    def gather(x):
        exchanges.append(iteration)
        return paddle.concat([x, paddle.to_tensor([other])])

    monkeypatch.setattr(parallel, "gather", gather)
    request, other[1] = stopping.StopRequest(), 0.25  # seconds of an iteration of the other rank; ours takes 0.1
    for iteration in range(1, 23):
        now[0] += 0.1
        other[0] = float(signal.SIGTERM) if iteration > 14 else 0.0
        asked = request.agreed()
        assert asked == (signal.SIGTERM if iteration in (17, 21) else 0)
    assert exchanges == [1, 5, 9, 13, 17, 21]


def test_two_processes_stop_together_whoever_gets_the_signal(undisturbed_two, tmp_path):
    folder = tmp_path / "run"
    for to_launcher in (True, False):
        step = logged_iterations(folder) + 3
        process = start(folder, "--resume", overrides=TWO, processes=2)
        wait_until(lambda: logged_iterations(folder) >= step)
        family = [process.pid, *descendants(process.pid)]
        os.kill(process.pid if to_launcher else ranks(process)[1], signal.SIGTERM)
        _ends(process, family, 60)
        stopped, log = newest_iteration(folder), (folder / "train.log").read_text()
        assert process.returncode == (signal.SIGTERM if to_launcher else 143)  # the launcher has a status of its own
        assert f"stopped by SIGTERM after iteration {stopped} of 150" in log and step <= stopped < 150, log
        assert f"after iteration {stopped} of 150" in Path(f"{folder}.log/workerlog.1").read_text()
    assert run(folder, "--resume", overrides=TWO, processes=2).returncode == 0
    assert same(folder, undisturbed_two)


# A rank that is there but does nothing: gloo waits 30 s for it, whatever is set; then the launcher has to end it by force.
@pytest.mark.parametrize("what", ["rank", "worker", pytest.param("hang", marks=pytest.mark.slow)])
def test_when_one_rank_fails_all_end_soon_and_the_launcher_says_which(tmp_path, what):
    folder = tmp_path / "run"
    process = start(folder, overrides=("save.interval_epochs=1000000",), processes=2)
    wait_until(lambda: logged_iterations(folder) >= 4)
    family = [process.pid, *descendants(process.pid)]
    rank = ranks(process)[1]
    os.kill(descendants(rank)[0] if what == "worker" else rank, signal.SIGSTOP if what == "hang" else signal.SIGKILL)
    seconds = _ends(process, family, 90)
    output = Path(f"{folder}.out").read_text()
    print(f"{seconds:.1f} s")
    assert process.returncode not in (0, None) and seconds < (60 if what == "hang" else 20)
    if what == "worker":  # a UserError of rank 1 alone
        assert re.search(r"error of rank 1: data worker 0 .* was killed by signal 9", output), output[-3000:]
    if "terminate called" not in output:  # Paddle's reducer may turn a lost connection into an abort, which nobody can catch
        named = re.search(r"Container rank (\d) status failed.* log (\S+)", output)
        if what != "hang":  # the launcher takes it for alive
            assert named[1] == "1" and named[2].endswith("workerlog.1")
        assert "rank 0 lost another process of the run" in (folder / "train.log").read_text()


def test_a_launcher_may_restart_a_run_that_has_no_checkpoint_yet(run_tool, undisturbed, tmp_path):
    folder = tmp_path / "run"
    result = run(folder, "--resume", overrides=RARELY)
    assert result.returncode == 0 and "holds no checkpoint yet; starting from the beginning" in result.stdout, result.stderr
    assert same(folder, undisturbed)
    for states in folder.glob("*.pdstates"):  # damaged ones are no reason to begin anew
        states.write_text("{")
    result = run(folder, "--resume", overrides=RARELY)
    assert result.returncode == 1 and "no checkpoint here is whole" in result.stderr and "--overwrite" in result.stderr


@pytest.mark.parametrize("limit", [False, True])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_to_do(limit):
    if disk_full.campaign(1, seed=1, limit=limit, say=lambda _: None) == "limit" and not limit:
        pytest.skip("no right to mount a small file system; a limit on the size of files was used instead")


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.log").symlink_to("/dev/full")  # as on a full disk
    result = run(folder, overrides=("optim.max_iters=2",))
    assert result.returncode == 0 and "Traceback" not in result.stderr and "iter: 2/" in result.stdout, result.stderr


def test_a_worker_that_outlives_a_killed_run_does_not_keep_the_next_one_out(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, overrides=RARELY)
    wait_until(lambda: logged_iterations(folder) >= 2)
    (worker,) = descendants(process.pid)
    os.kill(worker, signal.SIGSTOP)  # a long batch
    process.kill()
    process.wait()
    assert alive(worker)
    try:
        result = run(folder, "--resume", overrides=("optim.max_iters=2",))
        assert result.returncode == 0, result.stderr
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not alive(worker))


def test_a_damaged_date_does_not_let_a_checkpoint_be_passed_over_in_silence(tmp_path):
    for iteration in (2, 4):
        _save(tmp_path, iteration)
    states = tmp_path / "iter_4.pdstates"  # `latest` is the same file
    with open(states, "r+") as file:
        text = file.read().replace('"saved_at": ', '"saved_at": -')
        file.seek(0)
        file.write(text)
    path, _, notes = checkpoint.newest(tmp_path)
    assert path.name == "iter_2" and any("iter_4.pdstates: damaged" in note for note in notes)


def test_damage_at_a_hundred_places_is_seen_and_said():
    outcomes = damage.campaign(100, say=lambda _: None)
    assert sum(outcomes.values()) == 100 and sum("the one before" in outcome for outcome in outcomes) == 3


def _save(folder, iteration):
    checkpoint.save(folder, f"iter_{iteration}", {"a": np.full(4, iteration, "float32")}, {}, {"iteration": iteration})


def test_what_a_kill_left_is_tidied_and_nothing_else(tmp_path):
    _save(tmp_path, 2)
    _save(tmp_path, 4)
    (tmp_path / "iter_2.pdstates").unlink()  # a deletion goes in this order
    for name in ("iter_6.pdparams", ".iter_6.pdopt.tmp77"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("backbone.pdparams", "my_iter_3.pdparams", "iter_best.pdopt"):
        (tmp_path / name).write_bytes(b"the user's")
    checkpoint.remove_unfinished(tmp_path)
    left = {f"{name}{suffix}" for name in ("iter_4", "latest") for suffix in checkpoint.SUFFIXES}
    assert {path.name for path in tmp_path.iterdir()} == left | {"backbone.pdparams", "my_iter_3.pdparams", "iter_best.pdopt"}


def test_a_clock_that_is_set_back_does_not_make_the_newest_the_oldest(tmp_path, monkeypatch):
    _save(tmp_path, 2)
    monkeypatch.setattr(checkpoint.time, "time", lambda: 1000.0)
    for iteration in (4, 6):
        _save(tmp_path, iteration)
        checkpoint.prune(tmp_path, 2)
        assert checkpoint.newest(tmp_path)[1]["iteration"] == iteration
    assert {path.stem for path in tmp_path.glob("iter_*.pdstates")} == {"iter_4", "iter_6"}


@pytest.mark.slow
def test_damage_at_three_thousand_places():
    damage.campaign(3000, seed=1)


@pytest.mark.slow
def test_a_disk_that_is_full_at_random_places():
    disk_full.campaign(4, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes, times", [(1, 10), (2, 4)])
def test_kills_at_random_moments(processes, times):
    kill.campaign(times, processes, seed=5, iterations=40)
