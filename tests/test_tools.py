"""The tools around a run: eval, visualize, the shared command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ppdensecl.data.sources import FolderSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import correspondence, features, knn, objects
from ppdensecl.visual.curves import read_log
from ppdensecl.visual.views import draw_matches, pair_sheet

ROOT = Path(__file__).resolve().parent.parent
RUN = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=16", "data.batch_size=4", "data.workers=0",
       "model.queue_len=16", "log.interval=1", "log.visualdl=false", "optim.max_iters=2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("run")
    result = subprocess.run([sys.executable, "tools/train.py", *RUN, f"output_dir={folder}"], cwd=ROOT, capture_output=True,
                            text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("task", ["knn", "retrieval", "correspondence"])
def test_eval_scores_trained_and_random(run_folder, run_tool, tmp_path, task):
    result = run_tool("eval.py", "-c", run_folder / "config.yaml", "--checkpoint", run_folder / "latest", "--task", task,
                      "--count", 12, "--out", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "r.json").read_text())
    assert all(0 <= scores[name] <= 1 for name in ("trained", "random", "chance")) and f"{task}: trained" in result.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "/none/latest"], "/none/latest.pdparams: cannot be read"),
    (["--checkpoint", "README.md"], "README.md: not a PyTorch, Paddle or safetensors checkpoint"),
    (["--task", "knn", "-o", "data.source=folder", "data.root=docs/images"], "--task knn needs labels"),
])
def test_eval_refuses_in_one_sentence(run_folder, run_tool, arguments, words):
    common = ["--checkpoint", run_folder / "latest", "--task", "retrieval", "--count", "4"]
    result = run_tool("eval.py", "-c", run_folder / "config.yaml", *common, *arguments)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_visualize_draws_readable_pictures(run_folder, run_tool):
    result = run_tool("visualize.py", run_folder, "--matches", "2")
    assert result.returncode == 0, result.stderr
    for name in ("curves.png", "views.png", "matches_0.png", "matches_1.png"):
        picture = cv2.imread(str(run_folder / "pictures" / name))
        assert min(picture.shape[:2]) > 100 and picture.std() > 10
    missing = run_tool("visualize.py", "/none")
    assert missing.returncode == 1 and "/none/config.yaml: cannot read" in missing.stderr


def test_a_broken_picture_stops_neither_eval_nor_visualize(run_folder, run_tool, tmp_path):
    import shutil

    pictures, run = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    shutil.copytree(run_folder, run)
    for i in range(6):
        cv2.imwrite(str(pictures / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    (pictures / "0.png").write_bytes(b"broken")
    (run / "config.yaml").write_text(f"data: {{root: {pictures}, image_size: 64}}\nmodel: {{backbone: resnet18}}\n")
    for arguments in (["eval.py", "-c", run / "config.yaml", "--checkpoint", run / "latest", "--task", "retrieval"],
                      ["eval.py", "-c", run / "config.yaml", "--checkpoint", run / "latest", "--task", "correspondence"],
                      ["visualize.py", run]):
        result = run_tool(*arguments)
        assert result.returncode == 0, result.stderr


def test_read_log_counts_a_resumed_line_once(tmp_path):
    line = "epoch: {}/2, iter: {}/5, lr: 0.100000, loss: {}, accuracy: 0.5, avg_reader_cost: 0.1 sec, eta: 0:00:01\n"
    log = tmp_path / "train.log"
    log.write_text("".join(line.format(*at) for at in ((1, 5, 3.0), (2, 1, 2.0), (1, 5, 2.5))) + "saved x\n")
    found = read_log(log)
    assert found["iteration"] == [5, 6] and found["loss"] == [2.5, 2.0] and found["lr"] == [0.1, 0.1]
    log.write_text("nothing")
    with pytest.raises(UserError, match="no logged iterations"):
        read_log(log)


def test_amd_processors_get_mkls_fast_path_and_threads_are_taken_over(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import command_line

    for name in ("MKL_DEBUG_CPU_TYPE", "PPDENSECL_CPU_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(command_line, "_cpu_info", lambda: "vendor_id : AuthenticAMD")
    command_line._prepare_environment()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "5" and "AMD" in capsys.readouterr().err
    assert os.environ["PPDENSECL_CPU_THREADS"] == "3" and "OMP_NUM_THREADS" not in os.environ
    del os.environ["MKL_DEBUG_CPU_TYPE"]
    monkeypatch.setattr(command_line, "_cpu_info", lambda: "vendor_id : GenuineIntel")
    command_line._prepare_environment()
    assert "MKL_DEBUG_CPU_TYPE" not in os.environ


# --- what the checks compute ---

def test_knn_finds_clusters_and_shuffled_labels_give_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    bank = np.eye(4)[labels] + 0.2 * rng.standard_normal((400, 4))
    truth = rng.integers(0, 4, 200)
    queries = np.eye(4)[truth] + 0.2 * rng.standard_normal((200, 4))
    assert (knn.classify(bank, labels, queries) == truth).mean() > 0.97
    assert (knn.classify(bank, rng.permutation(labels), queries) == truth).mean() < 0.4
    assert knn.retrieval(bank, bank) == 1.0 and knn.retrieval(bank[:100], bank[100:200]) < 0.1


def test_object_crops_are_the_boxes():
    source = SyntheticSource(5)
    pictures, labels = objects.crops(source, range(5), margin=0)
    boxes = np.concatenate([source.scene(i).boxes for i in range(5)])
    assert len(pictures) == len(labels) == len(boxes) and labels.min() >= 0
    for picture, (x1, y1, x2, y2) in zip(pictures, boxes):
        assert picture.shape == (y2 - y1, x2 - x1, 3)


class _Positions:
    """A backbone that only sees where a colour is: matching by it must be right, and it can be broken."""

    def __call__(self, x):
        import paddle.nn.functional as F

        return F.avg_pool2d(x, 32)


def _padding(x):
    """A backbone that knows where a cell is, and nothing else."""
    import paddle

    return paddle.eye(49).reshape([1, 49, 7, 7]).expand([len(x), 49, 7, 7])


def test_correspondence_is_right_for_true_matches_and_at_chance_for_constant_ones():
    source = SyntheticSource(40)
    rows, columns = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 400), indexing="ij")
    picture = np.stack([rows, columns, 255 - (rows + columns) / 2], -1).astype(np.uint8)  # every place has its own colour
    source.picture = lambda index: picture
    geometry = Augmentation(size=(224, 224), jitter_p=0, gray_p=0, blur_p=0)
    found = correspondence.matched_share(_Positions(), source, geometry, 0, 3)
    assert found.right > 0.9 and found.chance < 0.25 and found.elsewhere > 0.9
    constant = correspondence.matched_share(lambda x: 0 * _Positions()(x) + 1, source, geometry, 0, 3)
    assert constant.right < 0.5
    own = correspondence.matched_share(_padding, source, geometry, 0, 40)
    assert own.right == own.own > own.chance and own.elsewhere == 0  # sees no picture, and is better than chance
    assert own.stayed == 1 > 5 * found.stayed
    shuffled = correspondence.matched_share(_Positions(), source, geometry, 0, 40, shuffle=True)
    assert abs(shuffled.right - shuffled.chance) < 0.03 and abs(shuffled.elsewhere - shuffled.chance) < 0.03


def test_a_network_that_saw_no_picture_is_matched_with_statistics_of_the_pictures():
    """Else its matches are those of the zero padding, which training never has."""
    source, geometry = SyntheticSource(40), Augmentation(size=(112, 112))
    start = features.random_backbone(18)
    copy = correspondence.normalising(start, source, geometry, 0)
    assert (start.bn1._mean == 0).all() and (start.bn1._variance == 1).all()  # training goes on with it
    assert (copy.conv1.weight == start.conv1.weight).all() and (copy.layer4[1].bn2._mean != 0).all() and not copy.training
    assert correspondence.normalising(copy, source, geometry, 0) is copy  # as any that has been trained
    cells = np.arange(16)

    def stayed(backbone):  # of all pairs of views, cells that are matched to their own position
        return np.mean([correspondence.matched_pair(backbone, source.picture(i), geometry, 0, i)[1].ravel() == cells
                        for i in range(10)])

    assert stayed(start) > 0.9 > 0.85 > stayed(copy)
    found = correspondence.matched_share(start, source, geometry, 0, 10)
    assert found == correspondence.matched_share(copy, source, geometry, 0, 10)


def test_a_backbone_loads_from_a_checkpoint_and_from_an_extracted_one(run_folder, run_tool, tmp_path):
    a = features.load_backbone(run_folder / "latest")
    assert a.depth == 18 and not a.training
    assert run_tool("extract_backbone.py", run_folder / "latest", tmp_path / "b.pdparams").returncode == 0
    b = features.load_backbone(tmp_path / "b.pdparams")
    picture = [SyntheticSource(1).picture(0)]
    assert (features.pooled(a, picture, (64, 64)) == features.pooled(b, picture, (64, 64))).all()
    arrays = checkpoint.load_weights(tmp_path / "b")
    del arrays["bn1._mean"]
    checkpoint.write_arrays(tmp_path / "c.pdparams", arrays)
    with pytest.raises(UserError, match="lacks 'bn1._mean'"):
        features.load_backbone(tmp_path / "c.pdparams")
    checkpoint.write_arrays(tmp_path / "d.pdparams", {"x": np.zeros(3)})
    with pytest.raises(UserError, match="no ResNet"):
        features.load_backbone(tmp_path / "d.pdparams")


def test_sheets(tmp_path):
    views = np.random.default_rng(0).integers(0, 256, (2, 5, 20, 30, 3), dtype=np.uint8)
    sheet = pair_sheet(views)
    assert sheet.dtype == np.uint8 and (sheet[12:32, 12:42] == views[0, 0]).all() and (sheet[12:32, 44:74] == views[1, 0]).all()
    matches, error = np.array([[3, 2], [1, 0]]), np.array([[0.5, 3.0], [np.nan, 0.9]])
    drawn = draw_matches(views[:, 0], matches, error, np.ones((2, 2)), scale=4, share=1)
    flat = drawn.reshape(-1, 3).tolist()
    assert [40, 200, 60] in flat and [230, 50, 40] in flat


def test_real_photos_make_a_source(data_folder):
    assert len(FolderSource(data_folder / "photos" / "images")) == 1500


def test_importing_the_library_imports_no_extra(run_tool):
    import pkgutil
    import subprocess
    import sys

    import ppdensecl

    modules = [m.name for m in pkgutil.walk_packages(ppdensecl.__path__, "ppdensecl.")]
    assert "ppdensecl.engine.trainer" in modules
    # The plug-ins, which are imported with the project that they are for.
    modules = [name for name in modules
               if not name.startswith(("ppdensecl.interop.paddleseg", "ppdensecl.interop.paddledet"))]
    code = (f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
            "extras = {'paddleseg', 'ppdet', 'sklearn', 'onnx', 'onnxruntime', 'paddle2onnx', 'torch', 'visualdl', 'matplotlib'}\n"
            "print(sorted(extras & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_page_on_speed_has_the_tables_that_were_measured():
    assert subprocess.run([sys.executable, "benchmarks/page.py", "--check"], cwd=ROOT).returncode == 0, "run benchmarks/page.py"


def test_positions_asks_a_dense_branch_what_it_tells_cells_by(run_folder):
    def positions(path):
        import subprocess
        import sys

        return subprocess.run([sys.executable, "benchmarks/positions.py", path, "--count", "6"], cwd=ROOT, text=True,
                              capture_output=True, timeout=120)

    found = positions(run_folder / "latest")
    assert found.returncode == 0, found.stderr
    cosines = dict(item.split() for item in found.stdout.rstrip().partition("latest ")[2].split(", "))
    assert list(cosines) == ["match", "others", "elsewhere", "queue"] and all(abs(float(value)) <= 1 for value in cosines.values())
    assert float(cosines["match"]) > float(cosines["elsewhere"])
    none = positions(run_folder / "nothing/latest")
    assert none.returncode == 1 and none.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in none.stderr
