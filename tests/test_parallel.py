"""Two real processes: what they exchange, what they compute together, and that they do not start where they disagree."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from parallel_run import BATCH, PROCESSES, pictures, steps

LAUNCH = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(PROCESSES)]
TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=16", "data.batch_size=4", "data.workers=0",
        "data.image_size=32", "model.stages=1", "model.queue_len=16", "log.interval=1", "log.visualdl=false", "optim.epochs=3"]


def _launch(folder, *command, timeout=240):
    return subprocess.run([*LAUNCH, "--log_dir", str(folder / "log"), *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, timeout=timeout, env={**os.environ, "PPDENSECL_CPU_THREADS": "1"})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes of parallel_run.py computed."""
    folder = tmp_path_factory.mktemp("parallel")
    result = _launch(folder, "tests/parallel_run.py", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(PROCESSES)]


def _job(ranks, job):
    return [{name.partition("/")[2]: value for name, value in rank.items() if name.startswith(job + "/")} for rank in ranks]


def test_a_shuffle_moves_rows_between_processes_and_brings_every_one_back(ranks):
    ranks, numbers, moved = _job(ranks, "exchanges"), np.arange(PROCESSES * BATCH), 0
    for step in range(5):
        shuffled = np.concatenate([rank[f"shuffled {step}"] for rank in ranks])
        assert sorted(shuffled) == list(numbers)
        moved += sum(number // BATCH != place // BATCH for place, number in enumerate(shuffled))
        for number, rank in enumerate(ranks):
            for part in range(4):
                rows = rank[f"restored {step} {part}"]
                expected = (numbers if part < 2 else numbers[number * BATCH:(number + 1) * BATCH]) * (part % 2 + 1)
                assert (rows.reshape(len(rows), -1) == expected[:, None]).all()
    assert moved > 5  # about half of 40


def test_the_processes_share_the_pictures_whose_correspondence_is_watched(tmp_path):
    """Each looks at its part, and the share is that of all."""
    from ppdensecl.config import load_config
    from ppdensecl.engine.building import build_source
    from ppdensecl.evaluation import correspondence, features

    result = _launch(tmp_path, "tools/train.py", *TINY, "log.correspondence_interval=2", "log.correspondence_pictures=5",
                     "optim.max_iters=2", f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stdout + result.stderr
    line = re.search(r"correspondence at iteration 2/2: ([\d.]+), chance ([\d.]+)", (tmp_path / "run/train.log").read_text())
    config = load_config(tmp_path / "run/config.yaml")
    found = correspondence.matched_share(features.load_backbone(tmp_path / "run/latest"), build_source(config),
                                         correspondence.larger_views(config.data.size), config.seed + 1, 5)
    assert tuple(f"{share:.4f}" for share in found[:2]) == line.groups()


def test_all_processes_have_the_same_parameters_and_queues_after_20_steps(ranks):
    first, second = _job(ranks, "plain")
    statistics = [name for name in first if name.endswith(("._mean", "._variance"))]
    for name in first.keys() - set(statistics) - {"losses"}:
        assert (first[name] == second[name]).all(), name
    assert any((first[name] != second[name]).any() for name in statistics)  # of their own batches, as in the authors' code


@pytest.mark.parametrize("job, options", [("plain", {}), ("moco", {"count": 2, "loss_lambda": 0.0}),
                                          ("accumulated", {"count": 2, "accumulate": 2})])
def test_two_processes_compute_what_one_does_with_two_groups(ranks, job, options):
    """One process whose batch is normalised in two parts is two processes, but for what BatchNorm keeps."""
    alone = steps(bn_groups=2, **options)
    ranks = _job(ranks, job)
    for name, value in alone.items():
        if name.endswith(("._mean", "._variance")):
            continue
        theirs = np.mean([rank["losses"] for rank in ranks], axis=0) if name == "losses" else ranks[0][name]
        np.testing.assert_allclose(theirs, value, rtol=0, atol=1e-11, err_msg=name)
    keys = len(alone["losses"]) * options.get("accumulate", 1) * len(pictures(0))
    assert alone["queue.pointer"] == keys % 30


def test_ranks_say_on_which_they_disagree(ranks):
    for rank in _job(ranks, "disagreements"):
        assert rank["mean"].tolist() == [0.5, 1.0]  # what is logged is the mean over the ranks
        same, value, long, names, error = rank["sentences"]
        assert same == ""
        assert value == "rank 1 has another b than rank 0, 1 instead of 0; start all ranks with the same"
        assert "rank 1 has another a" in long
        assert names == "rank 1 runs another version of ppdensecl than rank 0; install the same on all machines"
        assert error.endswith("no pictures hère")


def _train(folder, *arguments, rank_1=(), before=""):
    """tools/train.py in two processes, the second with further arguments, after the code `before`."""
    script = folder / "start.py"
    script.write_text("import os, runpy, sys\n" + before +
                      f"sys.argv += {[str(a) for a in rank_1]!r} if os.environ['PADDLE_TRAINER_ID'] == '1' else []\n"
                      f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
                      f"runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}, run_name='__main__')\n")
    return _launch(folder, script, *TINY, f"output_dir={folder / 'run'}", *arguments)


@pytest.mark.parametrize("rank_1, sentence", [
    (["-o", "optim.lr=0.5"], "rank 1 has another 'optim.lr' than rank 0, 0.5 instead of "),
    (["-o", "data.synthetic_count=17"], "rank 1 has another 'data.synthetic_count' than rank 0, 17 instead of 16"),
    (["-o", "data.source=folder", "data.root=/nowhere"], "rank 1: data.root"),
    (["-o", "optim.lr=fast"], "rank 1: -o optim.lr=fast"),
])
def test_a_run_does_not_start_where_ranks_differ(tmp_path, rank_1, sentence):
    result = _train(tmp_path, rank_1=rank_1)
    shown = result.stdout + result.stderr
    assert result.returncode != 0 and sentence in shown and "Traceback" not in shown
    assert not list(tmp_path.glob("run/*.pdparams"))


_FULL = "raise OSError(28, 'No space left on device', 'a/file')"


@pytest.mark.parametrize("broken, sentences", [
    ("LossSums.finite = lambda self: os.environ['PADDLE_TRAINER_ID'] == '0'", ["the loss is not finite at iteration 2"] * 2),
    (f"def save(*_): {_FULL}\ncheckpoint.save = save", ["a/file: No space left on device", "rank 0: a/file: No space left"]),
    (f"def begin(*_): {_FULL}\nrun_folder.begin = begin", ["a/file: No space left on device", "rank 0: a/file: No space left"])])
def test_what_one_rank_finds_wrong_at_a_start_or_a_checkpoint_ends_all(tmp_path, broken, sentences):
    """Nobody waits for the one that is gone: that would take minutes."""
    before = (f"sys.path.insert(0, {str(ROOT)!r})\nimport ppdensecl\nfrom ppdensecl.engine import checkpoint, run_folder\n"
              f"from ppdensecl.engine.logging import LossSums\n{broken}\n")
    result = _train(tmp_path, "save.interval_epochs=1", before=before)
    logs = [(tmp_path / f"log/workerlog.{n}").read_text() for n in range(2)]
    assert result.returncode != 0 and not list(tmp_path.glob("run/*.pdparams"))
    for log, sentence in zip(logs, sentences):
        assert sentence in log and "lost another process" not in log and "Traceback" not in log, logs


def test_a_run_goes_on_in_another_number_of_processes(run_tool, tmp_path):
    alone = run_tool("train.py", *TINY, "data.batch_size=8", "optim.max_iters=3", f"output_dir={tmp_path / 'run'}")
    assert alone.returncode == 0, alone.stderr
    result = _train(tmp_path, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the run had 1 process(es), now it has 2" in result.stdout and "at iteration 3" in result.stdout
    assert "an epoch has" not in result.stdout  # the global batch, and so the order of the pictures, is the same
