"""A search by example: what is the same is found first, in its place, and the sheet can be read."""

import json
import shutil

import cv2
import numpy as np
import pytest

from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.engine import checkpoint
from ppdensecl.evaluation import features


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similar")
    backbone = features.random_backbone(18, 3, seed=5)
    checkpoint.write_arrays(folder / "b.pdparams", {name: value.numpy() for name, value in backbone.state_dict().items()})
    scenes = SyntheticSource(12, 3, (128, 160))
    (folder / "p").mkdir()
    for i in range(12):
        cv2.imwrite(str(folder / "p" / f"{i:02}.png"), scenes.scene(i).picture[:, :, ::-1])
    (folder / "p" / "broken.png").write_bytes(b"broken")
    return folder


def test_what_is_the_same_is_found_first(world, run_tool):
    (world / "index").mkdir()
    np.save(world / "index" / "old.npy", np.zeros(3))
    result = run_tool("similar.py", world / "index", "--pictures", world / "p", "--checkpoint", world / "b", "--size", "128", "160")
    assert result.returncode == 0 and "12 pictures, 1 left out" in result.stdout, result.stderr
    assert "left out: " in result.stderr and "broken.png" in result.stderr
    assert len(list((world / "index").glob("*.npy"))) == 2  # and no old ones
    # Turned by half: the same pooled feature nearly, the same place elsewhere.
    picture = cv2.imread(str(world / "p" / "07.png"))
    moved = np.roll(picture, (32, 48), (0, 1))
    cv2.imwrite(str(world / "query.png"), moved)
    result = run_tool("similar.py", world / "index", world / "query.png", "--at", "72", "72", "--count", "3", "--out", world / "s.png")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 7, result.stdout + result.stderr
    assert lines[0].startswith("picture 07.png: 0.") and lines[3].startswith("place   07.png row 2, column 1: "), result.stdout
    sheet = cv2.imread(str(world / "s.png"))
    assert sheet.shape[1] > sheet.shape[0] > 200
    yellow = (np.abs(sheet.astype(int) - (0, 255, 255)).max(2) < 30)
    assert yellow.any()


@pytest.mark.parametrize("arguments, status, words", [
    ([], 2, "give a QUERY"), (["q", "--pictures", "."], 2, "belong together"), (["{0}/none.png"], 1, "none.png: cannot be read"),
    (["{0}/b.pdparams"], 1, "b.pdparams"), (["{0}/p/01.png", "--at", "160", "5"], 1, "--at 160 5: lies outside"),
    (["{0}/p/01.png", "--out", "{0}/none/s.png"], 1, "cannot be written")])
def test_bad_input_is_one_sentence(world, run_tool, arguments, status, words):
    if not (world / "index").exists():
        run_tool("similar.py", world / "index", "--pictures", world / "p", "--checkpoint", world / "b", "--size", "128", "160")
    result = run_tool("similar.py", world / "index", *(text.format(world) for text in arguments))
    assert result.returncode == status and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_changed_pictures_and_a_missing_file_ask_for_a_new_index(world, run_tool, tmp_path):
    shutil.copytree(world / "p", tmp_path / "p")
    run_tool("similar.py", tmp_path / "i", "--pictures", tmp_path / "p", "--checkpoint", world / "b", "--size", "128", "160")
    cv2.imwrite(str(tmp_path / "p" / "03.png"), np.zeros((50, 50, 3), np.uint8))
    for change in (lambda: None, (tmp_path / "p" / "04.png").unlink, next((tmp_path / "i").glob("*.npy")).unlink):
        change()
        result = run_tool("similar.py", tmp_path / "i", world / "p" / "01.png")
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "make the index again" in result.stderr


def test_no_index_and_a_damaged_one(world, run_tool, tmp_path):
    for content in (None, "{", json.dumps({"root": "."})):
        if content:
            (tmp_path / "index.json").write_text(content)
        result = run_tool("similar.py", tmp_path, world / "p" / "01.png")
        assert result.returncode == 1 and "--pictures and --checkpoint" in result.stderr and "Traceback" not in result.stderr
