"""The probes of tools/eval.py, as processes on small folders of synthetic objects. (`test_probe_scores.py`: their arithmetic.)

Chance: `--shuffle-labels` permutes the labels of training and test pictures each for itself, so that a prediction is right with
probability 1/4 whatever it rests on (four classes, equally many test pictures). Over n pictures the share stays below
1/4 + 4·sqrt(3/16 / n) but in one of 10,000 runs; the seeds are fixed, so that it does or does not, always.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ppdensecl.config import load_config
from ppdensecl.data.synthetic import CLASSES, SyntheticSource
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import dense, features, labelled, objects, semi, tasks

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = ("target", "chessboard", "pennant", "moon")
TINTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))  # a third of it makes a shape easy to tell without any training
TRAIN, TEST = 30, 25  # pictures of each class
BOUND = 0.25 + 4 * (3 / 16 / (4 * TEST)) ** 0.5
CONFIG = ["-c", "configs/densecl_r18_demo.yaml", "-o", "device=cpu", "data.image_size=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint (an untrained two-stage ResNet-18: its features separate these objects), class folders, lists, scenes."""
    folder = tmp_path_factory.mktemp("probes")
    backbone = features.random_backbone(18, 2, seed=5)
    checkpoint.write_arrays(folder / "backbone.pdparams", {name: value.numpy() for name, value in backbone.state_dict().items()})
    pictures, labels = objects.crops(SyntheticSource(230, 3), range(230))
    for number, name in enumerate(CHOSEN):
        mine = [p for p, label in zip(pictures, labels) if CLASSES[label] == name and min(p.shape[:2]) > 16]
        assert len(mine) >= TRAIN + TEST
        for i, picture in enumerate(mine[: TRAIN + TEST]):
            picture = (picture * (2 / 3) + np.array(TINTS[number]) / 3).astype(np.uint8)
            part = "train" if i < TRAIN else "test"
            path = folder / part / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture[:, :, ::-1])
            with open(folder / f"{part}.txt", "a") as file:
                file.write(f"{part}/{name}/{i}.png {number}\n")
    scenes = SyntheticSource(30, 4)
    for i in range(30):
        part, scene = "train" if i < 20 else "test", scenes.scene(i)
        cv2.imwrite(str(folder / f"scene{i}.png"), scene.picture[:, :, ::-1])
        mask = scene.mask.copy()
        mask[:3] = 255
        cv2.imwrite(str(folder / f"mask{i}.png"), mask)
        with open(folder / f"dense_{part}.txt", "a") as file:
            file.write(f"scene{i}.png mask{i}.png\n")
    return folder


@pytest.fixture
def run_eval(world, run_tool, tmp_path):
    """run_eval(task, option, …) → (CompletedProcess, the JSON)."""
    def run(task, *arguments, fails=False, cache=tmp_path / "cache"):
        kept = [] if task == "semi" else ["--cache", cache]
        result = run_tool("eval.py", *CONFIG, "--checkpoint", world / "backbone", "--task", task, *kept, *arguments, "--out",
                          tmp_path / "result.json")
        if fails:
            assert result.returncode == 1 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1, result.stderr
            return result.stderr
        assert result.returncode == 0, result.stderr
        return result, json.loads((tmp_path / "result.json").read_text())
    return run


def folders(world):
    return ["--train-dir", world / "train", "--test-dir", world / "test"]


def lists(world):
    return ["--train-list", world / "train.txt", "--test-list", world / "test.txt"]


# --- each task as a process -------------------------------------------------------------------------------------------


FAST = {"knn": ["--neighbours", "5", "20"], "linear": ["--epochs", "20", "--lr", "30", "1", "0.03", "--batch-size", "32"],
        "semi": ["--fraction", "0.5", "--epochs", "5", "--batch-size", "16", "--lr", "0.01"]}


@pytest.mark.parametrize("task", FAST)
def test_features_that_separate_beat_chance_and_shuffled_labels_do_not(world, run_eval, task):
    result, found = run_eval(task, *folders(world), *FAST[task])
    assert found["chance"] == 0.25 and found["trained"] > BOUND, found["details"]
    assert f"{task}: trained {100 * found['trained']:.1f} %, random start" in result.stdout
    assert found["checkpoint_sha256"] == checkpoint.sha256_of(world / "backbone.pdparams")
    assert found["environment"]["paddle"] and "tools/eval.py" in found["command"] and found["config"]["data"]["image_size"] == 32
    _, control = run_eval(task, *folders(world), *FAST[task], "--shuffle-labels")
    for name in ("trained", "random"):
        assert control[name] < BOUND, control["details"]
    if task != "semi":
        assert found["details"]["trained"]["pictures_extracted"] == 4 * (TRAIN + TEST)
        assert control["details"]["trained"]["pictures_extracted"] == 0  # the labels are no part of the features


def test_semi_lists_its_balanced_pictures(world, run_eval):
    short = ["--fraction", "0.1", "--epochs", "1", "--batch-size", "8"]
    chosen = run_eval("semi", *folders(world), *short)[1]["details"]["trained"]["pictures"]["10 %"]
    assert len(chosen) == 12 and all(sum(name.startswith(shape) for name in chosen) == 3 for shape in CHOSEN)
    assert all((world / "train" / name).is_file() for name in chosen)
    train, test, _ = labelled.open_pair(world / "train", world / "test", None, None)
    part = train.only(semi.split(train.labels, 0.1, 0))
    assert [part.shown(i) for i in range(len(part))] == chosen
    backbone = features.random_backbone(18, 1)
    before = features.digest(backbone)
    first, second = (semi.probe(backbone, part, test.only([0, 30]), 4, (32, 32), 0.1, 10, 1, 8, seed=0) for _ in range(2))
    assert features.digest(backbone) == before and first == second  # each share of the labels starts from the checkpoint


def test_lists_and_folders_are_the_same_and_a_cache_hit_gives_the_same_numbers(world, run_eval, tmp_path):
    _, first = run_eval("knn", *folders(world))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == 4 and all(name.endswith(".npy") for name in kept)  # two backbones, two sets
    _, second = run_eval("knn", *folders(world))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    assert second["details"]["trained"].pop("pictures_extracted") == 0
    assert first["details"]["trained"].pop("pictures_extracted") == 4 * (TRAIN + TEST)
    assert first["details"]["trained"] == second["details"]["trained"]
    _, listed = run_eval("knn", *lists(world))
    assert listed["trained"] == first["trained"]


def test_linear_with_augmentation_learns(world, run_eval):
    _, found = run_eval("linear", *lists(world), "--augment", "--epochs", "8", "--lr", "0.1", "--batch-size", "32")
    assert found["trained"] > BOUND and found["details"]["trained"]["pictures_extracted"] == 4 * TEST


def test_dense_beats_one_class_everywhere_and_shuffled_pixels_do_not(world, run_eval):
    options = ["--train-list", world / "dense_train.txt", "--test-list", world / "dense_test.txt", "--size", "64", "80",
               "--stage", "2", "--epochs", "15", "--batch-size", "4", "--lr", "0.3"]
    _, found = run_eval("dense", *options)
    assert found["trained"] > 1.15 * found["chance"] and found["details"]["trained"]["per_class"][0] > 0.5
    _, both = run_eval("dense", *options, "--stage", "1", "2", "--no-random")
    assert both["trained"] > found["trained"]  # the finer map shows where an object ends
    _, control = run_eval("dense", *options, "--shuffle-labels")
    for scores in control["details"].values():  # nothing was learned of places, and the test's labels were never seen
        assert abs(scores["accuracy"] - scores["by_chance"]) < 3e-3, control
    assert found["trained"] > found["details"]["trained"]["by_chance"] + 0.01


def test_of_the_dense_control_neither_place_nor_share_belongs_to_the_picture(world):
    """How much of each class a picture has says what its cells show: a probe with such labels scores above chance."""
    pictures = labelled.open_segmentation("--train-list", world / "dense_train.txt")
    true, control = ([np.asarray(maps[i]) for i in range(len(pictures))] for maps in (
        dense.LabelMaps(pictures), dense.LabelMaps(pictures, 0)))
    counts, shuffled = ([tuple(np.bincount(labels.ravel(), minlength=256)) for labels in maps] for maps in (true, control))
    assert sorted(counts) == sorted(shuffled) and len(set(counts)) > 4
    assert sum(a == b for a, b in zip(counts, shuffled)) < len(counts) / 2
    for labels in control:  # a place has its neighbour's class no more often than any other's
        assert abs((labels[1:] == labels[:-1]).mean() - ((np.bincount(labels.ravel()) / labels.size) ** 2).sum()) < 0.05


def test_the_maps_of_several_stages_score_as_their_stack_does():
    rng = np.random.default_rng(0)
    maps = [rng.normal(3, 2, (2, width, *size)).astype(np.float32) for width, size in ((5, (8, 10)), (7, (4, 5)))]
    moments = [dense.statistics(stage) for stage in maps]
    layers = [paddle.nn.Conv2D(stage.shape[1], 3, 1) for stage in maps]
    found = dense._scores(layers, maps, moments, slice(None), (16, 20)).numpy()
    stack = paddle.concat([F.interpolate(paddle.to_tensor((stage - mean[:, None, None]) / deviation[:, None, None]), (16, 20),
                                         mode="bilinear", align_corners=False)
                           for stage, (mean, deviation) in zip(maps, moments)], axis=1)
    weight = paddle.concat([layer.weight for layer in layers], axis=1)
    assert np.abs(found - F.conv2d(stack, weight, layers[0].bias + layers[1].bias).numpy()).max() < 1e-5


def test_pairs_of_views_that_are_shuffled_are_found_by_chance(world):
    config = load_config(*CONFIG[1:2], ["data.source=synthetic", "data.synthetic_count=200", "data.image_size=32"])
    backbone = features.load_backbone(world / "backbone.pdparams")
    shares = []
    for shuffle in (None, True):
        look, score = tasks.retrieval(tasks.resolve("retrieval", {"count": 200, "shuffle_labels": shuffle}), config)
        shares.append(score(look(backbone))["accuracy"])
    assert shares[0] > 0.1 and shares[1] <= 0.03, shares  # chance is 1 in 200


def test_camvid(data_folder, run_eval, tmp_path):
    for part, count in (("train", 24), ("test", 8)):
        listed = (data_folder / "camvid" / f"{part}.txt").read_text().splitlines()
        (tmp_path / f"{part}.txt").write_text("\n".join(listed[:: len(listed) // count][:count]))
    _, found = run_eval("dense", "--train-list", tmp_path / "train.txt", "--test-list", tmp_path / "test.txt", "--root",
                        data_folder / "camvid", "--size", "90", "120", "--epochs", "10", "--batch-size", "4")
    assert len(found["details"]["trained"]["per_class"]) == 11 and found["trained"] > 1.5 * found["chance"], found


@pytest.fixture(scope="module")
def voc(world, tmp_path_factory):
    """VOC2007's layout with the objects: of each of its 20 classes are those of one or two shapes; a few are difficult."""
    folder = tmp_path_factory.mktemp("voc")
    (folder / "JPEGImages").mkdir()
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for part in ("trainval", "test"):
        paths = sorted((world / ("train" if part == "trainval" else "test")).glob("*/*.png"))
        for i, path in enumerate(paths):
            cv2.imwrite(str(folder / "JPEGImages" / f"{part}{i:03}.jpg"), cv2.imread(str(path)))
        for number, name in enumerate(labelled.VOC_CLASSES):
            shapes = {CHOSEN[number % 4], CHOSEN[number // 4 % 4]}
            labels = [0 if i % 17 == number % 17 else 1 if path.parent.name in shapes else -1 for i, path in enumerate(paths)]
            (sets / f"{name}_{part}.txt").write_text("".join(f"{part}{i:03} {label:2}\n" for i, label in enumerate(labels)))
    return folder


def test_svm(voc, run_eval):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = ["--voc07", voc, "--costs", "0.1", "10", "--low-shot", "1", "8", "--low-shot-costs", "1", "--samples", "2"]
    _, found = run_eval("svm", *options)
    scores = found["details"]["trained"]
    assert found["trained"] > found["chance"] + 0.2 and len(scores["per_class"]) == 20
    assert found["trained"] == pytest.approx(np.mean(list(scores["per_class"].values())))
    low = scores["low_shot"]
    assert found["chance"] < low["1"]["mean"] < low["8"]["mean"] < found["trained"] and len(low["1"]["samples"]) == 2
    assert low["1"]["std"] == pytest.approx(np.std(low["1"]["samples"])) and low["1"]["std"] > 0
    _, control = run_eval("svm", *options, "--shuffle-labels")
    assert control["chance"] == found["chance"] and max(control["trained"], control["random"]) < control["chance"] + 0.12, control


def test_svm_takes_class_folders_too(world, voc, run_eval):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = ["--costs", "1", "--low-shot", "4", "--low-shot-costs", "1", "--samples", "1"]
    _, found = run_eval("svm", *folders(world), *options)
    assert found["chance"] == 0.25 and found["trained"] > 0.5 and set(found["details"]["trained"]["per_class"]) == set(CHOSEN)
    assert "use one of them" in run_eval("svm", *folders(world), "--voc07", voc, *options, fails=True)


def test_svm_names_what_is_missing(voc, run_eval, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    copy = tmp_path / "VOC2007"
    shutil.copytree(voc, copy)
    (copy / "JPEGImages" / "test003.jpg").unlink()
    assert "test003.jpg is missing" in run_eval("svm", "--voc07", copy, fails=True)
    (copy / "ImageSets" / "Main" / "cat_test.txt").unlink()
    assert "cat_test.txt is missing; " in run_eval("svm", "--voc07", copy, fails=True)
    with pytest.raises(UserError, match="JPEGImages is missing .and 1 others"):
        labelled.open_voc07(tmp_path)


def test_svm_without_sklearn_says_what_to_install(run_eval, tmp_path, monkeypatch, voc):
    (tmp_path / "sklearn.py").write_text("raise ImportError")  # as if it were not there
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install scikit-learn" in run_eval("svm", "--voc07", voc, fails=True)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_kill_during_extraction_leaves_no_whole_looking_cache(world, run_eval, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text((world / "train.txt").read_text() * 12)
    options = ["--train-list", long, "--test-list", world / "test.txt", "--root", world, "--neighbours", "20"]
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "tools/eval.py", *CONFIG, "--checkpoint", str(world / "backbone"), "--task",
                                "knn", "--cache", str(cache), *map(str, options)], cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob("*.part")) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    part, = cache.iterdir()
    assert part.suffix == ".part" and part.stat().st_size > 0
    _, found = run_eval("knn", *options)
    assert found["details"]["trained"]["pictures_extracted"] == 12 * 4 * TRAIN + 4 * TEST
    assert not list(cache.glob("*.part")) and found["trained"] > 0.25


def extracted(world, backbone, cache, **options):
    source = labelled.open_pair(world / "train", world / "test", None, None)[1]
    return features.extract(backbone, source, options.pop("size", (32, 32)), cache, **options)


def test_what_decides_the_features_decides_the_file(world, tmp_path):
    backbone, other = features.random_backbone(18, 2, seed=5), features.random_backbone(18, 2, seed=6)
    first, computed = extracted(world, backbone, tmp_path)
    assert computed == first.shape[0] == 4 * TEST and first.dtype == np.float32 and first.shape[1] == 128
    assert isinstance(first, np.memmap) and extracted(world, backbone, tmp_path, stage=2)[1] == 0
    assert extracted(world, backbone, tmp_path, stage=1)[0].shape[1] == 64
    assert extracted(world, backbone, tmp_path, pooling="map")[0].shape[1:] == (128, 4, 4)
    assert np.allclose(extracted(world, backbone, tmp_path, pooling="map")[0].mean((2, 3)), first, atol=1e-5)
    assert (extracted(world, other, tmp_path)[0] != first).any() and extracted(world, backbone, tmp_path, size=(48, 32))[1]
    with pytest.raises(UserError, match="stages 1 to 2"):
        extracted(world, backbone, tmp_path, stage=3)


def test_a_changed_picture_is_seen_and_a_broken_one_leaves_nothing(world, tmp_path):
    shutil.copytree(world / "test", tmp_path / "test")
    backbone = features.random_backbone(18, 2, seed=5)

    def again():
        return features.extract(backbone, labelled.open_pair(tmp_path / "test", tmp_path / "test", None, None)[0], (32, 32),
                                tmp_path / "cache")

    before, _ = again()
    path = sorted((tmp_path / "test" / "chessboard").iterdir())[0]
    picture = cv2.imread(str(path))
    cv2.imwrite(str(path), 255 - picture)
    after, computed = again()
    assert computed and ((before != after).any(1)).sum() == 1
    path.write_bytes(b"broken")
    files = sorted((tmp_path / "cache").glob("*.npy"))
    with pytest.raises(UserError, match="mend it, or take it out"):
        again()
    assert sorted((tmp_path / "cache").glob("*.npy")) == files


def test_two_processes_do_not_write_the_same_file(world, tmp_path):
    first = tmp_path / "x.npy"
    waiting = subprocess.Popen([sys.executable, "-c", f"import fcntl\nfile = open({str(tmp_path / 'x.part')!r}, 'ab')\n"
                                "fcntl.lockf(file, fcntl.LOCK_EX)\nprint(1, flush=True)\ninput()"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    waiting.stdout.readline()
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    with pytest.raises(UserError, match="another process is extracting"):
        features._write(first, 3, 1, iter([(0, rows)]))
    waiting.communicate(b"\n")
    features._write(first, 3, 2, iter([(0, rows[:2]), (2, rows[2:])]))
    assert (np.load(first) == rows).all() and os.listdir(tmp_path) == ["x.npy"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, arguments, words", [
    ("linear", [], "--train-dir is not set; it should be a folder that holds a folder of pictures for each class"),
    ("linear", ["--train-dir", "{0}/none", "--test-dir", "{0}/test"], "does not exist"),
    ("semi", ["--train-dir", "{0}/train/moon", "--test-dir", "{0}/test"], "lies in no class's folder"),
    ("linear", ["--train-list", "{0}/train.txt", "--test-list", "{0}/backbone.pdparams"], "expected `path label`"),
    ("dense", ["--train-list", "{0}/train.txt", "--test-list", "{0}/test.txt"], "cannot be read as a label map"),
    ("knn", ["--train-dir", "{0}/train", "--test-dir", "{0}/test", "--augment"], "--augment is not used by --task knn"),
    ("svm", ["--voc07", "{0}"], "JPEGImages is missing"),
])
def test_bad_input_is_one_sentence(world, run_eval, task, arguments, words):
    if task == "svm":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert words in run_eval(task, *(argument.format(world) for argument in arguments), fails=True)


@pytest.mark.parametrize("task, given, words", [
    ("linear", {"lr": [30.0, 0.0]}, "--lr 0: expected a number above 0"), ("dense", {"lr": [1.0, 2.0]}, "takes one"),
    ("semi", {"fraction": [1.5]}, "--fraction 1.5"), ("knn", {"size": [31]}, "--size 31: expected a number from 32 to 4096"),
    ("knn", {"size": [64, 64, 64]}, "--size takes one number"), ("dense", {"stage": [2, 5]}, "--stage 5"),
    ("knn", {"stage": [1, 2]}, "--stage: several are for --task dense"),
    ("retrieval", {"stage": [1]}, "--stage is not used by --task retrieval"),
    ("linear", {"lr": [float("nan")]}, "--lr nan")])
def test_options_out_of_bounds_are_refused(task, given, words):
    with pytest.raises(UserError) as error:
        tasks.resolve(task, given)
    assert words in str(error.value)


def test_a_checkpoint_whose_keys_do_not_all_load_is_refused(world, run_tool, tmp_path):
    arrays = checkpoint.load_weights(world / "backbone.pdparams")
    arrays["renamed.weight"] = arrays.pop("layer2.1.conv2.weight")
    checkpoint.write_arrays(tmp_path / "b.pdparams", arrays)
    result = run_tool("eval.py", *CONFIG, "--checkpoint", tmp_path / "b", "--task", "linear", *folders(world), "--cache",
                      tmp_path / "cache")
    assert result.returncode == 1 and "lacks 'layer2.1.conv2.weight'" in result.stderr and not (tmp_path / "cache").exists()


def test_labels_that_do_not_fit_are_refused(world, tmp_path):
    (tmp_path / "a.txt").write_text("x.png 0\ny.png 1\n")
    (tmp_path / "b.txt").write_text("# nothing\n\nx.png 2\n")
    (tmp_path / "c.txt").write_text("x.png 0\n")
    with pytest.raises(UserError, match="the class '2' is not among those of --train-list .2 classes"):
        labelled.open_pair(None, None, tmp_path / "a.txt", tmp_path / "b.txt")
    with pytest.raises(UserError, match="use either folders or lists"):
        labelled.open_pair(world / "train", None, None, tmp_path / "b.txt")
    with pytest.raises(UserError, match="needs two classes"):
        labelled.open_pair(None, None, tmp_path / "c.txt", tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("\n".join(f"a b.png {n}" for n in (10, 9, 1)))
    train, _, classes = labelled.open_pair(None, None, tmp_path / "d.txt", tmp_path / "d.txt")
    assert classes == ["1", "9", "10"] and train.labels.tolist() == [2, 1, 0] and train.shown(0) == "a b.png"
    maps = dense.LabelMaps(labelled.open_segmentation("--train-list", world / "dense_train.txt"))
    classes, pixels = dense.count_classes(maps)
    assert classes == 9 and pixels.sum() == 20 * 125 * 160  # without the ignored rows
    with pytest.raises(UserError, match="--classes 3"):
        dense.count_classes(maps, 3)
    with pytest.raises(UserError, match="which no training label has"):
        dense.chance(pixels[:4], maps)
    with pytest.raises(UserError, match="one channel of 8 bits"):
        dense.LabelMaps(labelled.Labelled(world, [b"scene0.png"], ["scene0.png"]))[0]
