"""Probes by a protocol's file, on listed pictures, and shared by several processes; where results go; too few pictures."""

import importlib
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml

from conftest import ROOT
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features

CONFIG = ["-c", "configs/densecl_r18_demo.yaml", "-o", "device=cpu", "data.image_size=32"]
COUNT = 90  # of each of two classes: two groups of 64 and one of 52, of which one process gets two


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint of an untrained stage, and noise of two tints in class folders."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    backbone = features.random_backbone(18, 1, seed=5)
    checkpoint.write_arrays(folder / "backbone.pdparams", {name: value.numpy() for name, value in backbone.state_dict().items()})
    for part, count in (("train", COUNT), ("test", 20)):
        for number, name in enumerate(("red", "blue")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 100, (40, 40, 3), np.uint8)
                picture[:, :, number] += 100
                cv2.imwrite(str(folder / part / name / f"{name}{i}.png"), picture)
    return folder


@pytest.fixture
def run_eval(world, run_tool, tmp_path):
    def run(*arguments, cache="cache", status=0):
        result = run_tool("eval.py", *CONFIG, "--checkpoint", world / "backbone", *arguments, "--out", tmp_path / "result.json",
                          *(["--cache", tmp_path / cache] if cache else []))
        assert result.returncode == status and "Traceback" not in result.stderr, result.stdout + result.stderr
        return result.stdout + result.stderr if status else json.loads((tmp_path / "result.json").read_text())
    return run


def folders(world):
    return ["--train-dir", world / "train", "--test-dir", world / "test"]


def test_processes_share_the_extraction_and_the_file_is_the_same(world, run_eval, tmp_path):
    alone = run_eval("--task", "knn", *folders(world), cache="alone")
    shared = run_eval("--task", "knn", *folders(world), "--processes", "2", cache="shared")
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len(files) == 4 and files == sorted(path.name for path in (tmp_path / "shared").glob("*.*"))
    for name in files:
        a, b = (np.load(tmp_path / folder / name) for folder in ("alone", "shared"))
        assert a.shape == b.shape and a.any(1).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # other threads, another order of sums
    assert shared["trained"] == alone["trained"] > 0.9
    assert shared["details"]["trained"]["pictures_extracted"] == 2 * COUNT + 40


def test_a_picture_that_breaks_on_one_rank_ends_all_with_its_name(world, run_eval, tmp_path):
    shutil.copytree(world / "train", tmp_path / "train")
    (tmp_path / "train" / "blue" / "blue80.png").write_bytes(b"broken")  # in the second group
    shown = run_eval("--task", "knn", "--train-dir", tmp_path / "train", "--test-dir", world / "test", "--processes", "2",
                     status=1)
    assert "rank 1: " in shown and "blue80.png" in shown and "mend it" in shown
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_no_random_start_and_names_that_several_have(world, run_eval, tmp_path):
    found = run_eval("--task", "knn", *folders(world), "--no-random")
    assert "random" not in found and "random" not in found["details"] and found["trained"] > 0.9
    for name in ("red", "blue"):
        shutil.copytree(world / "train" / name, tmp_path / "train" / name)
        cv2.imwrite(str(tmp_path / "train" / name / "same name.png"), np.zeros((40, 40, 3), np.uint8))
    path = tmp_path / "split.txt"
    path.write_text("same name.png\n")
    short = ["--task", "semi", "--train-dir", tmp_path / "train", "--test-dir", world / "test", "--epochs", "1", "--batch-size", "2",
             "--split", path]
    assert "several training pictures are called same name.png" in run_eval(*short, cache=None, status=1)
    path.write_text("red/same name.png\nblue/same name.png\n")
    assert len(run_eval(*short, "--no-random", cache=None)["details"]["trained"]["pictures"]["listed"]) == 2


def test_a_task_that_cannot_be_shared_says_so(world, run_eval):
    shown = run_eval("--task", "retrieval", "--count", "4", "--processes", "2", cache=None, status=1)
    assert "runs in one process" in shown


def test_a_protocol_is_options_and_the_command_line_counts_more(world, run_eval, tmp_path):
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump({"task": "linear", "train-dir": str(world / "train"), "test-dir": str(world / "test"),
                                    "lr": [1.0, 0.1], "epochs": 9, "batch-size": 32, "augment": False, "size": [40, 32]}))
    options = run_eval("--protocol", path, "--epochs", "2")["options"]
    assert (options["epochs"], options["lr"], options["batch_size"], options["augment"], options["size"]) == (
        2, [1.0, 0.1], 32, False, [40, 32])
    path.write_text("task: linear\nrate: 30\n")
    assert "unrecognized arguments: --rate 30" in run_eval("--protocol", path, status=2)
    for content in ("- a", "a: b: c"):
        path.write_text(content)
        assert f"--protocol {path}: " in run_eval("--protocol", path, status=1)
    assert "--task or --protocol is needed" in run_eval(status=2)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "probes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_protocols_name_options_that_their_tasks_have(path):
    from ppdensecl.evaluation import tasks

    found = {name.replace("-", "_"): value for name, value in yaml.safe_load(path.read_text()).items()}
    task = found.pop("task")
    for name in ("lr", "size", "fraction"):
        if name in found and not isinstance(found[name], list):
            found[name] = [found[name]]
    tasks.resolve(task, {**dict.fromkeys(tasks.OPTIONS), **found})


def test_semi_takes_listed_pictures(world, run_eval, tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("red3.png\nblue/blue7.png\nred5.png\nblue1.png\n")
    short = ["--task", "semi", *folders(world), "--epochs", "1", "--batch-size", "2", "--split", path]
    found = run_eval(*short, cache=None)["details"]["trained"]
    assert sorted(found["pictures"]["listed"]) == ["blue/blue1.png", "blue/blue7.png", "red/red3.png", "red/red5.png"]
    path.write_text("red3.png\nnobody.png\n")
    assert "nobody.png is none of the training pictures (1 of 2 are not)" in run_eval(*short, cache=None, status=1)


# --- where the result goes ---

@pytest.mark.parametrize("out, words", [
    ("taken", "is a folder; give the name of a file"), ("none/r.json", "there is no folder"),
    ("/proc/x.json", "no file can be made there (No such file or directory)"), ("/dev/null", "is no regular file"),
])
def test_a_result_that_cannot_be_written_is_refused_before_anything_runs(run_tool, tmp_path, out, words):
    (tmp_path / "taken").mkdir()
    path = tmp_path / out
    result = run_tool("eval.py", "-c", "/none.yaml", "--checkpoint", "/none", "--task", "retrieval", "--out", path)
    assert result.returncode == 1 and result.stderr.startswith(f"error: --out {path}: {words}"), result.stderr
    assert len(result.stderr.splitlines()) == 1 and "--resume" not in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


@pytest.fixture
def eval_tool(world, monkeypatch, capsys):
    """tools/eval.py in this process: (what it printed, the UserError's text or None); .said has the lines of stderr."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    eval_tool = importlib.import_module("eval")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *CONFIG, "--checkpoint", str(world / "backbone"), *map(str, arguments)])
        error = None
        try:
            eval_tool.main()
        except UserError as found:
            error = str(found)
        shown, run.said = capsys.readouterr()
        return shown, error
    return run


def test_a_score_is_printed_before_it_is_written(eval_tool, monkeypatch, tmp_path):
    def full(path, text):
        raise UserError(f"{path}: cannot be written")

    arguments = ["--task", "retrieval", "--count", "4", "--out", tmp_path / "r.json"]
    shown, error = eval_tool(*arguments)
    assert shown.startswith("retrieval: trained ") and ", random start " in shown and shown.count("\n") == 1 and error is None
    trained = shown.split(", random")[0]
    assert f"so far: {trained}, chance" in eval_tool.said
    monkeypatch.setattr(checkpoint, "write_text", full)
    assert eval_tool(*arguments) == ("", f"{tmp_path}/r.json: cannot be written") and f"so far: {trained}, chance" in eval_tool.said
    shown, error = eval_tool(*arguments, "--no-random")
    assert shown.startswith(f"{trained}, chance") and error and "so far" not in eval_tool.said


def test_a_random_start_without_a_score_leaves_the_trained_ones(eval_tool, world, monkeypatch, tmp_path):
    make = features.random_backbone

    def broken(*arguments):
        backbone = make(*arguments)
        bias = [value for name, value in backbone.named_parameters() if name.endswith("bn2.bias")][-1]
        bias.set_value(bias + float("inf"))
        return backbone

    monkeypatch.setattr(features, "random_backbone", broken)
    out = tmp_path / "r.json"
    shown, error = eval_tool("--task", "linear", *folders(world), "--epochs", "1", "--cache", tmp_path / "cache", "--out", out)
    assert shown.startswith("linear: trained ") and "random" not in shown and error is None
    assert "so far: linear: trained" in eval_tool.said and "note: the random start has no score: " in eval_tool.said
    found = json.loads(out.read_text())
    assert "trained" in found and "random" not in found and [*found["details"]] == ["trained"]


def test_a_closed_terminal_does_not_take_the_result(run_eval, world, tmp_path):
    command = [sys.executable, "tools/eval.py", *CONFIG, "--checkpoint", world / "backbone", "--task", "retrieval", "--count", "4",
               "--out", tmp_path / "r.json"]
    with open("/dev/full", "w") as full:
        subprocess.run([str(word) for word in command], cwd=ROOT, stdout=full, timeout=100)
    assert {"trained", "random"} <= json.loads((tmp_path / "r.json").read_text()).keys()


# --- too few pictures ---

def small_pictures(folder, count, broken=(), size=(40, 200)):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"broken")
    return ["-o", f"data.root={folder}", "data.source=folder"]


def test_what_stands_in_for_a_broken_picture_is_not_searched_beside_itself(eval_tool, tmp_path):
    shown, error = eval_tool("--task", "retrieval", "--out", tmp_path / "r.json",
                             *small_pictures(tmp_path / "pictures", 6, broken=[2]))
    assert error is None and shown.endswith(", chance 20.0 %\n")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["chance"] == 1 / 5 and all((5 * found[name]).is_integer() for name in ("trained", "random"))


@pytest.mark.parametrize("count, broken, words", [
    (1, [], "--task retrieval needs at least 2 pictures to choose from, and found 1 that can be decoded in 'data' (1 listed)"),
    (3, [0, 2], "found 1 that can be decoded in 'data' (3 listed)"), (2, [0, 1], "found 0 that can be decoded"),
])
def test_a_choice_of_one_picture_is_no_score(eval_tool, tmp_path, count, broken, words):
    shown, error = eval_tool("--task", "retrieval", "--out", tmp_path / "r.json",
                             *small_pictures(tmp_path / "pictures", count, broken))
    assert words in error and shown == "" and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("broken", [[], [0]])
def test_views_that_share_no_cell_are_no_score(eval_tool, tmp_path, broken):
    pictures = small_pictures(tmp_path / "pictures", 1, broken)
    shown, error = eval_tool("--task", "correspondence", *pictures, "seed=5")  # by which its two views lie apart
    assert error.startswith("--task correspondence: no pair of views shares a cell") and "(1 listed)" in error and shown == ""
    if not broken:
        assert "correspondence: trained" in eval_tool("--task", "correspondence", *pictures, "seed=1")[0]
