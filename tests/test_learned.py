"""Does a backbone that was really trained beat a random start on real pictures, in every probe, and a control nothing?

PPDENSECL_TEST_RUN names the folder of a finished run of configs/densecl_r18_photos.yaml; without it these are skipped. About ten
minutes on one thread. Patches of CamVid of six classes, equally many of each: with shuffled labels the share of 360 right answers
stays within four standard deviations of 1/6 (mean average precision: of the classes' share, 1/6).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

CLASSES = ["0=sky", "1=building", "3=road", "4=pavement", "5=tree", "8=car"]
BOUND = 1 / 6 + 4 * (5 / 36 / 360) ** 0.5
OPTIONS = {"knn": ["--neighbours", "20"], "linear": ["--lr", "30", "3", "0.3"], "svm": ["--low-shot", "16", "--samples", "2"],
           "semi": ["--fraction", "0.3", "--batch-size", "32"]}


@pytest.fixture(scope="module")
def run_folder():
    folder = os.environ.get("PPDENSECL_TEST_RUN", "")
    if not (Path(folder) / "latest.pdparams").is_file():
        pytest.skip("PPDENSECL_TEST_RUN names no folder of a finished run")
    return Path(folder)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    data = Path(os.environ.get("PPDENSECL_TEST_DATA", "")) / "camvid"
    if not data.is_dir():
        pytest.skip("PPDENSECL_TEST_DATA names no folder with the research pictures")
    folder = tmp_path_factory.mktemp("patches")
    for part, count in (("train", 100), ("test", 60)):
        subprocess.run([sys.executable, "benchmarks/patches.py", str(data / f"{part}.txt"), str(folder / part), "--count", str(count),
                        "--classes", *CLASSES], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONS)
def test_trained_beats_random_and_shuffled_labels_are_chance(run_folder, patches, run_tool, tmp_path, task):
    if task == "svm":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    kept = [] if task == "semi" else ["--cache", patches / "features"]

    def scores(*more):
        result = run_tool("eval.py", "-c", run_folder / "config.yaml", "--checkpoint", run_folder / "latest", "--task", task,
                          "--size", "96", "--train-dir", patches / "train", "--test-dir", patches / "test", *kept, *OPTIONS[task],
                          "--out", tmp_path / "result.json", *more, timeout=1800)
        assert result.returncode == 0, result.stdout + result.stderr
        found = json.loads((tmp_path / "result.json").read_text())
        return found["trained"], found["random"]

    trained, random = scores()
    assert trained > random + 0.05 and random > BOUND
    assert max(scores("--shuffle-labels")) < BOUND
