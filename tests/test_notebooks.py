"""The notebooks: as they should be in git, and executed at lite size where a user may have them.

The slow ones, all but the first notebook: about 4 minutes (2 cores that also did other work)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

from conftest import ROOT  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
CHINESE = re.compile("[\u4e00-\u9fff]")


def test_there_are_four():
    assert [path.name[0] for path in NOTEBOOKS] == list("1234")


@ALL
def test_nothing_of_a_run_is_kept(path):
    book = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert all(set(cell) == {"id", "cell_type", "metadata", "source"} for cell in book.cells if cell.cell_type == "markdown")
    for cell in book.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    text = path.read_text(encoding="utf-8")
    assert text == nbformat.writes(book) + "\n"  # as Jupyter writes it: a change of one line is one line in git
    assert not re.findall(r"/(?:work|root|tmp|mnt)\b", text)
    assert max(len(line) for cell in book.cells for line in cell.source.split("\n") if cell.cell_type == "code") <= 130


@ALL
def test_every_text_is_in_both_languages(path):
    for cell in nbformat.read(path, nbformat.NO_CONVERT).cells:
        if cell.cell_type == "markdown":
            paragraphs = re.split(r"\n{2,}", re.sub(r"```.*?```", "", cell.source, flags=re.S).strip())
            chinese = [bool(CHINESE.search(paragraph)) for paragraph in paragraphs]
            prose = [is_chinese for is_chinese, paragraph in zip(chinese, paragraphs) if paragraph[0] not in "$|"]
            assert prose == sorted(prose) and prose.count(True) and prose.count(False), cell.source  # first one, then the other


@ALL
def test_every_link_and_file_exists(path):
    for cell in nbformat.read(path, nbformat.NO_CONVERT).cells:
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            assert target.startswith("https://") or (path.parent / target).is_file(), target
        for target in re.findall(r"\b(?:tools|configs|docs|ppdensecl)/[\w./-]+\.(?:py|ya?ml|md)\b", cell.source):
            assert (ROOT / target).is_file(), target


def execute(path, folder, kernels_folder, monkeypatch, **changes):
    """Runs a notebook with its kernel in `kernels_folder`; names in `changes` get another value. Returns what it printed."""
    monkeypatch.setenv("PPDENSECL_LITE", "1")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    for name in ("ppdensecl", "tools", "configs", "hubconf.py", "requirements.txt", "requirements-gpu.txt"):
        os.symlink(ROOT / name, folder / name)
    book = nbformat.read(path, nbformat.NO_CONVERT)
    for name, value in changes.items():
        (cell,) = (cell for cell in book.cells if re.search(f"^{name} = None", cell.source, re.M))
        cell.source = re.sub(f"^{name} = None", f"{name} = {value!r}", cell.source, flags=re.M)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(kernels_folder)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream"), pictures


@pytest.fixture
def clone(tmp_path):
    """A folder for the project, and the folder of its notebooks: how Jupyter starts in a clone."""
    folder = tmp_path / "clone" / "notebooks"
    folder.mkdir(parents=True)
    return folder.parent, folder


def test_step_by_step(tmp_path, monkeypatch):
    """In AI Studio's way: the kernel starts beside the project's folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    printed, pictures = execute(NOTEBOOKS[0], folder, tmp_path, monkeypatch)
    assert pictures == 6 and "ppdensecl/models/densecl.py:" in printed and "trained: " in printed
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_pretraining(clone, monkeypatch):
    printed, pictures = execute(NOTEBOOKS[1], *clone, monkeypatch)
    assert pictures == 6 and "resumed from output/notebooks/pretrain/run/iter_2 at iteration 2" in printed
    assert "correspondence: trained" in printed and "100 entries of the query encoder's backbone" in printed


@pytest.mark.slow
def test_pretraining_on_a_folder_with_blanks(clone, monkeypatch):
    pictures = clone[0] / "my pictures"
    pictures.mkdir()
    from ppdensecl.data.synthetic import SyntheticSource

    for i in range(9):
        (pictures / f"{i}.png").write_bytes(SyntheticSource(9, size=(64, 90)).read(i))
    printed, _ = execute(NOTEBOOKS[1], *clone, monkeypatch, PICTURES=str(pictures))
    assert "my pictures: 9 pictures" in printed and not (clone[0] / "output/notebooks/pretrain/pictures").exists()


@pytest.mark.slow
def test_fine_tuning(clone, monkeypatch):
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
    printed, pictures = execute(NOTEBOOKS[2], *clone, monkeypatch)
    assert pictures == 3 and "RANDOM weights" in printed and "PaddleSeg loads all 100 tensors" in printed
    assert "105/105 tensors of the backbone loaded" in printed and "bbox: AP" in printed and "mIoU" in printed


@pytest.mark.slow
def test_converting(clone, monkeypatch):
    printed, pictures = execute(NOTEBOOKS[3], *clone, monkeypatch)
    assert pictures == 1 and "220 tensors, all equal bit for bit" in printed
    assert "380 of the 380 tensors went there and back" in printed
    assert "torch.load gives the same 380 tensors" in printed or "PyTorch is not installed" in printed


@pytest.mark.slow
def test_converting_a_backbone_alone(clone, monkeypatch):
    """What torchvision and the authors publish for fine-tuning."""
    from ppdensecl.engine import checkpoint
    from ppdensecl.interop import convert
    from ppdensecl.models import ResNet

    arrays = {name: value.numpy() for name, value in ResNet(18).state_dict().items()}
    checkpoint.write_arrays(clone[0] / "b.pdparams", arrays)
    convert.to_torch(str(clone[0] / "b.pdparams"), str(clone[0] / "theirs.pth"), backbone=True)
    printed, _ = execute(NOTEBOOKS[3], *clone, monkeypatch, AUTHORS=str(clone[0] / "theirs.pth"))
    assert "100 tensors, all equal bit for bit" in printed and "tensors went there and back" in printed


@ALL
def test_set_up_installs_only_where_something_is_missing(path, tmp_path, monkeypatch):
    """The set-up cell alone, with pip replaced by a note of what it was asked for."""
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[command.index("-c"):]))
    monkeypatch.setattr(sys, "path", sys.path[:])
    (source,) = (cell.source for cell in nbformat.read(path, nbformat.NO_CONVERT).cells if '"pip"' in cell.source)
    find, missing = importlib.util.find_spec, set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find("json"))
    monkeypatch.chdir(ROOT / "notebooks")
    exec(source, {})
    assert asked == [] and Path.cwd() == ROOT and sys.path[0] == str(ROOT)
    missing.add("lmdb")
    exec(source, {})
    missing.add("paddle")
    exec(source, {})
    pins = (ROOT / "requirements-gpu.txt").read_text()
    for command, paddle in zip(asked, ([], ["paddlepaddle==3.3.1"])):  # the first must leave a paddlepaddle-gpu alone
        assert command[:2] == ["-c", "requirements-gpu.txt"] and [name for name in command if "paddlepaddle" in name] == paddle
        assert all(f"\n{name}==" in pins for name in command[2:] if name not in paddle) and "lmdb" in command
    assert len(asked) == 2 and ("paddledet" in asked[0]) == path.name.startswith("3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="clone it or unpack it beside this notebook"):
        exec(source, {})
