"""The pictures of a run: each shows what its title says."""

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import paddle.nn.functional as F
import pytest

from conftest import ROOT
from ppdensecl.config import load_config
from ppdensecl.data.sources import FolderSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.errors import UserError
from ppdensecl.evaluation.correspondence import matched_pair
from ppdensecl.evaluation.features import random_backbone
from ppdensecl.visual import cells, curves, pca, pictures, retrieval
from ppdensecl.visual.views import RIGHT, UNSEEN, WRONG, draw_lines

LINE = ("[2026/11/23 16:26:49] ppdensecl INFO: epoch: 1/2, iter: {0}/9, lr: 0.030000, loss: 3.5, loss_global: {1}, "
        "loss_dense: 3.0, lambda: 0.5000, accuracy: 0.5, positive: 0.8, negative: 0.1, dense_accuracy: 0.4, dense_positive: 0.7, "
        "dense_negative: 0.0, matched_share: 0.7, avg_reader_cost: 0.01 sec, avg_batch_cost: 1.0 sec, avg_samples: 32.0, "
        "avg_ips: 30.5 images/sec, eta: 0:00:39")
CHECK = "[2026/11/23 16:26:50] ppdensecl INFO: correspondence at iteration {}/18: {}, chance 0.0754, own position 0.2, where that is wrong 0.1000"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two iterations with its pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    for command in (["tools/train.py", "-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=8", "data.batch_size=4",
                     "data.workers=0", "model.queue_len=16", "log.interval=1", "log.visualdl=false", "optim.max_iters=2",
                     "save.interval_iters=1", f"output_dir={folder}"],
                    ["tools/visualize.py", str(folder), "--matches", "1", "--count", "8"]):
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    for module in (cells, curves, pca, retrieval):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    return figures


def _titles(figure):
    return [axis.get_title() for axis in figure.axes]


class _Colours:
    """A backbone that tells a place by its colour."""

    def __call__(self, x):
        return F.avg_pool2d(x, 32)


def _view():
    """A picture in which every place has its own colour, and views that keep it."""
    rows, columns = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 400), indexing="ij")
    picture = np.stack([rows, columns, 255 - (rows + columns) / 2], -1).astype(np.uint8)
    return picture, Augmentation(size=(192, 224), jitter_p=0, gray_p=0, blur_p=0), 0, 3


def _share(view):
    """Of the query view's cells, those that the key view shows."""
    return 1 - np.isnan(matched_pair(_Colours(), *view)[2]).mean()


def test_the_tool_draws_every_kind_and_takes_away_what_an_earlier_call_drew_more(run_folder, run_tool, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "pictures" / "mutual_7.png").write_bytes(b"old")
    (run / "pictures" / "mine.png").write_bytes(b"kept")
    result = run_tool("visualize.py", run, "--matches", "1", "--count", "2", "--cell", "3", "0", "--threshold", "0.5")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (run / "pictures").iterdir()}
    assert names == {"curves.png", "views.png", "pca.png", "retrieval.png", "matches_0.png", "mutual_0.png", "similarity_0.png",
                     "checkpoint.json", "mine.png"}
    for name in names - {"checkpoint.json", "mine.png"}:
        picture = cv2.imread(str(run / "pictures" / name))
        assert min(picture.shape[:2]) > 200 and picture.std() > 10, name
    again = [cv2.imread(str(folder / "pictures" / "similarity_0.png")) for folder in (run, run_folder)]
    assert again[0].shape == again[1].shape and (again[0] != again[1]).any()  # another cell


@pytest.mark.parametrize("arguments, status, words", [
    (["--checkpoint", "none"], 1, "none.pdparams: cannot be read"), (["--threshold", "2"], 2, "from -1 to 1"),
    (["--count", "1"], 2, "at least 2"), (["--matches", "0"], 2, "at least 1")])
def test_bad_options_are_one_sentence(run_folder, run_tool, tmp_path, arguments, status, words):
    shutil.copytree(run_folder, tmp_path / "run")
    result = run_tool("visualize.py", tmp_path / "run", *arguments)
    assert result.returncode == status and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_pictures_that_nobody_can_decode_are_one_sentence(run_folder, run_tool, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "a.jpg").write_bytes(b"broken")
    (tmp_path / "run" / "config.yaml").write_text(f"data: {{root: {tmp_path}, image_size: 64}}\nmodel: {{backbone: resnet18}}\n")
    for picture in (tmp_path / "run" / "pictures").iterdir():
        picture.unlink()
    result = run_tool("visualize.py", tmp_path / "run")
    assert result.returncode == 1 and "none of the 1 pictures" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


# --- curves ----------------------------------------------------------------------------------------------------------


def test_of_two_checks_of_one_iteration_the_later_counts(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("\n".join([CHECK.format(0, 0.30), CHECK.format(9, 0.35), LINE.format(1, 4.0), CHECK.format(9, 0.3812),
                              CHECK.format(5, "nan"), CHECK.format(18, "--.e")]))
    found = curves.read_correspondence(log)
    assert found["iteration"] == [0, 5, 9] and found["right"][::2] == [0.30, 0.3812] and found["chance"] == [0.0754] * 3
    assert found["own"] == [0.2] * 3 and found["elsewhere"] == [0.1] * 3
    assert curves.read_log(log)["avg_ips"] == [30.5]
    assert curves.read_correspondence(Path(__file__))["iteration"] == []


@pytest.mark.parametrize("number", ["...", "-", "9" * 5000, "1e", "nan", "-inf"])
def test_a_log_with_odd_numbers_is_read(tmp_path, number, drawn):
    log = tmp_path / "train.log"
    log.write_text(LINE.format(1, number) + "\n" + LINE.format("9" * 5000, 1) + "\n" + LINE.format(2, 3.0))
    found = curves.read_log(log)
    assert found["iteration"] == [1, 2] and found["loss_dense"] == [3.0, 3.0]
    curves.draw_curves(found, curves.read_correspondence(log), 16, None)


def test_curves_have_their_panels_and_the_truth_where_the_log_has_it(tmp_path, drawn):
    log = tmp_path / "train.log"
    for checks in ([], [CHECK.format(0, 0.3), CHECK.format(9, 0.4)]):
        log.write_text("\n".join([LINE.format(1, 4.0), LINE.format(9, 2.0), *checks]))
        curves.draw_curves(curves.read_log(log), curves.read_correspondence(log), 15, None)
    for figure, matched in zip(drawn, (1, 5)):
        losses, accuracy, share, similarity, rate, speed = figure.axes
        assert [len(axis.lines) for axis in figure.axes] == [3, 3, matched, 4, 1, 1]
        assert losses.lines[0].get_ydata()[-1] == 2.0 and losses.lines[2].get_ydata()[0] == np.log(16)
        assert speed.lines[0].get_ydata()[0] == 30.5 and all(axis.get_title() for axis in figure.axes)
    assert list(drawn[1].axes[2].lines[1].get_ydata()) == [0.3, 0.4]


def test_what_a_cut_leaves_of_a_line_is_not_taken_for_a_line(tmp_path):
    log, whole, other = tmp_path / "train.log", LINE.format(1, 4.0), LINE.format(2, 3.0)
    log.write_text(whole)
    first = curves.read_log(log)
    for cut in range(len(other)):
        log.write_text(f"{whole}\n{other[:cut]}")
        assert curves.read_log(log) == first, other[:cut]
    log.write_text(f"{whole}\n{other}")
    both = curves.read_log(log)
    assert both["iteration"] == [1, 2]
    for cut in range(len(whole)):  # what is written next goes on behind it
        log.write_text(f"{LINE.format(9, 1.0)[:cut]}{whole}\n{CHECK.format(9, 0.35)[:cut]}{other}\n")
        assert curves.read_log(log) == both, cut
    check = CHECK.format(9, 0.3812)
    for cut in range(len(check)):
        log.write_text(f"{CHECK.format(0, 0.3)}\n{check[:cut]}")
        assert curves.read_correspondence(log)["iteration"] == [0], check[:cut]


def test_of_lines_with_different_fields_each_shows_what_it_has(tmp_path, drawn):
    log, dense = tmp_path / "train.log", ("loss_dense", "dense_accuracy", "dense_positive", "dense_negative", "matched_share")
    plain = LINE.replace("loss_dense: 3.0, ", "").replace("dense_accuracy: 0.4, dense_positive: 0.7, ", "").replace(
        "dense_negative: 0.0, matched_share: 0.7, ", "")
    log.write_text("\n".join(line.format(at, 3.5 + at) for at, line in ((1, LINE), (2, LINE), (3, LINE), (5, plain), (6, plain))))
    found = curves.read_log(log)
    assert found["iteration"] == [1, 2, 3, 5, 6] and found["loss_global"] == [4.5, 5.5, 6.5, 8.5, 9.5] and set(dense) < set(found)
    assert all(found[name][:3] == [found[name][0]] * 3 and found[name][3:] == [None] * 2 for name in dense)
    curves.draw_curves(found, curves.read_correspondence(log), 16, None)
    losses, _, share, *_ = drawn[0].axes
    np.testing.assert_array_equal(np.array(losses.lines[1].get_ydata(), float), [3, 3, 3, np.nan, np.nan])
    assert len(share.lines) == 1 and list(losses.lines[0].get_ydata()) == found["loss_global"]


def test_no_legend_hides_anything(tmp_path, drawn):
    log = tmp_path / "train.log"
    log.write_text("\n".join([LINE.format(1, 4.0), LINE.format(9, 2.0), CHECK.format(0, 0.3), CHECK.format(9, 0.5)]))
    curves.draw_curves(curves.read_log(log), curves.read_correspondence(log), 2048, None)
    drawn[0].draw_without_rendering()
    legends = [axis.get_legend() for axis in drawn[0].axes]
    assert [len(legend.get_texts()) if legend else 0 for legend in legends] == [3, 3, 5, 4, 0, 0]
    boxes = [(number, legend.get_window_extent()) for number, legend in enumerate(legends) if legend]
    for number, box in boxes:
        assert not any(box.overlaps(axis.get_window_extent()) for axis in drawn[0].axes), number
        assert not any(box.overlaps(other) for at, other in boxes if at != number), number
        assert all(not box.overlaps(axis.title.get_window_extent()) for axis in drawn[0].axes), number
        assert drawn[0].bbox.x0 <= box.x0 and box.x1 <= drawn[0].bbox.x1 and drawn[0].bbox.y0 <= box.y0, number


# --- cells -----------------------------------------------------------------------------------------------------------


def test_cosines_are_those_that_matching_goes_by():
    backbone = random_backbone(18, 3)
    views, matches, _, similarity = matched_pair(backbone, *_view())
    cosine = cells.cosines(backbone, views)
    assert cosine.shape == (matches.size,) * 2 and cosine.max() <= 1.001
    np.testing.assert_allclose(cosine[np.arange(matches.size), matches.flatten()], similarity.flatten(), atol=1e-5)


def test_mutual_cells_are_each_others_nearest_above_the_threshold():
    cosine = np.array([[0.95, 0.2, 0.1, 0.0], [0.97, 0.3, 0.1, 0.0], [0.1, 0.85, 0.2, 0.0], [0.1, 0.2, 0.3, 0.92]])
    matches = cosine.argmax(1).reshape(2, 2)  # 0, 0, 1, 3
    assert cells.mutual(cosine, matches, 0.9).tolist() == [[False, True], [False, True]]
    assert cells.mutual(cosine, matches, 0.8).tolist() == [[False, True], [True, True]]
    assert not cells.mutual(cosine, matches, 0.98).any()


def test_lines_have_the_colour_of_the_truth_and_do_not_lie_on_each_other():
    views = np.zeros((2, 80, 80, 3), np.uint8)
    error = np.array([[0.5, 3.0], [np.nan, 0.9]])

    def drawn(chosen):
        return draw_lines(views, np.array([[0, 1], [2, 3]]), error, np.array(chosen), scale=2)

    def colours(chosen):
        flat = drawn(chosen).reshape(-1, 3).tolist()
        return [list(colour) in flat for colour in (RIGHT, WRONG, UNSEEN)]
    assert colours([[True, False], [False, False]]) == [True, False, False]
    assert colours([[False, True], [False, False]]) == [False, True, False]
    assert colours([[False, False], [True, False]]) == [False, False, True]
    assert colours([[True, True], [True, True]]) == [True, True, True]
    tops = [np.flatnonzero(drawn(chosen)[:, :160].any((1, 2)))[0] for chosen in ([[True, False], [False] * 2],
                                                                                 [[False, True], [False] * 2])]
    assert tops[0] + 15 < tops[1] < 70  # of one row, and in their cells


def test_titles_count_what_is_right(drawn):
    backbones = {"good": _Colours(), "blind": lambda x: 0 * _Colours()(x) + 1}
    cells.draw_pair(backbones, _view(), None)
    views, matches, error, _ = matched_pair(backbones["good"], *_view())
    visible, right = int((~np.isnan(error)).sum()), int((error <= 1).sum())
    assert 4 < visible < matches.size and right > 0.8 * visible  # or the picture proves little
    good, blind = _titles(drawn[0])
    assert good == f"good: {right} of the {visible} cells that both views show are matched to within one cell of the truth"
    assert blind.startswith("blind: ") and not blind.startswith(f"blind: {right} ")
    cells.draw_mutual(backbones, _view(), 0.9, None)
    good, blind = _titles(drawn[1])
    chosen = cells.mutual(cells.cosines(backbones["good"], views), matches, 0.9)
    right, wrong, unseen = (int((chosen & which).sum()) for which in (error <= 1, error > 1, np.isnan(error)))
    assert right > 10 and good == (f"good: {right + wrong + unseen} of {matches.size} cells pass: {right} right, {wrong} wrong, "
                                   f"{unseen} of unseen places")
    assert blind.startswith(f"blind: 1 of {matches.size} cells pass")  # of equal cells the first has the first
    cells.draw_mutual(backbones, _view(), 1, None)
    assert "0 right, 0 wrong, 0 of unseen" in _titles(drawn[2])[0]


def test_the_similarity_of_a_cell_is_greatest_at_its_true_place(drawn):
    view = _view()
    _, matches, error, _ = matched_pair(_Colours(), *view)
    rows, columns = matches.shape
    for cell in map(tuple, np.argwhere(~np.isnan(error))[::7]):
        cells.draw_similarity({"good": _Colours()}, view, cell, None)
        query, key, good, *_ = drawn[-1].axes
        near = np.asarray(good.images[1].get_array())
        assert near.shape == (rows, columns) and near.argmax() == matches[cell]
        assert query.get_title() == f"query view: row {cell[0]}, column {cell[1]}"
        assert f"{error[cell]:.1f} cells from the truth" in good.get_title()
        (x,), (y,) = good.lines[0].get_data()
        found = divmod(int(matches[cell]), columns)
        # It is as far from the circle as the match is from the truth, in cells of 32 pixels.
        assert max(abs((x + 0.5) / 32 - 0.5 - found[1]), abs((y + 0.5) / 32 - 0.5 - found[0])) == pytest.approx(error[cell])
    unseen = tuple(np.argwhere(np.isnan(error))[0])
    cells.draw_similarity({"good": _Colours()}, view, unseen, None)
    assert "does not show" in drawn[-1].axes[1].get_title() and not drawn[-1].axes[2].lines
    for outside in ((rows, 0), (0, columns), (-1, 0)):
        with pytest.raises(UserError, match="counted from 0"):
            cells.draw_similarity({"good": _Colours()}, view, outside, None)


def test_views_without_a_common_cell_have_none_to_choose():
    wide, augmentation = np.zeros((200, 1000, 3), np.uint8), _view()[1]
    apart = next(index for index in range(100) if _share((wide, augmentation, 0, index)) == 0)
    with pytest.raises(UserError, match=f"picture {apart} show no cell in common"):
        cells.draw_similarity({"good": _Colours()}, (wide, augmentation, 0, apart), None, None)


def test_the_cell_that_nobody_asked_for_has_contrast_and_a_true_place_inside(drawn):
    picture, *rest = _view()
    picture = picture // 2 + np.random.default_rng(0).integers(0, 127, (30, 40, 1), np.uint8).repeat(10, 0).repeat(10, 1)
    for index in (0, 4, 7, 11, 13):
        view = (picture, *rest[:2], index)
        views, _, error, _ = matched_pair(_Colours(), *view)
        contrast = {(row, column): views[0, 32 * row:32 * row + 32, 32 * column:32 * column + 32].mean(2).std()
                    for row in range(1, 5) for column in range(1, 6) if not np.isnan(error[row, column])}
        row, column = max(contrast, key=contrast.get)
        cells.draw_similarity({"good": _Colours()}, view, None, None)
        assert drawn[-1].axes[0].get_title() == f"query view: row {row}, column {column}"


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_that_share_less_than_a_quarter_of_their_cells_are_passed_over(tmp_path):
    wide, augmentation, seed = np.zeros((200, 800, 3), np.uint8), _view()[1], 20
    for i in range(24):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), wide)
    shares = [_share((wide, augmentation, seed, index)) for index in range(24)]
    right = [index for index, share in enumerate(shares) if share >= 0.25]
    assert 3 < len(right) < 22 and 0 not in right and any(0 < share < 0.25 for share in shares)  # or they prove little
    (tmp_path / f"{right[0]:02d}.png").write_bytes(b"broken")
    source = FolderSource(str(tmp_path))

    def taken(count):
        return [index for *_, index in pictures._overlapping(source, count, augmentation, 32, seed)]
    assert sorted(taken(24)) == right[1:] and taken(1) == right[1:2]
    assert taken(2) == [right[1], 23 if 23 in right else right[2]]  # spread over all of them


def test_a_run_whose_only_pair_shares_too_little_says_so(run_folder, run_tool, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text().replace("synthetic_count: 8", "synthetic_count: 1")

    def shared(seed):
        path.write_text(text.replace("seed: 0", f"seed: {seed}"))
        config = load_config(path)
        picture = pictures.build_source(config).picture(0)
        return _share((picture, pictures.larger_views(config.data.size), config.seed + 1, 0))
    assert shared(next(seed for seed in range(1, 200) if shared(seed) < 0.25)) < 0.25
    drawn = (tmp_path / "run" / "pictures" / "mutual_0.png").read_bytes()
    result = run_tool("visualize.py", tmp_path / "run")
    assert result.returncode == 1 and "of none of its 1 pictures do the two views share 25% of their cells" in result.stderr
    assert "Traceback" not in result.stderr and (tmp_path / "run" / "pictures" / "mutual_0.png").read_bytes() == drawn


# --- features --------------------------------------------------------------------------------------------------------


def test_cells_of_like_features_have_like_colours(drawn):
    maps = np.random.default_rng(0).normal(0, 0.01, (2, 8, 6, 6)).astype(np.float32)
    maps[:, 0], maps[:, 1, :, 3:], maps[:, 2, 3:] = 1, 1, 1
    pictures = np.zeros((2, 60, 60, 3), np.uint8)
    pca.draw_pca(pictures, {"iteration 5": maps, "random start": maps[::-1]}, None)
    assert [title for title in _titles(drawn[0]) if title] == ["picture", "iteration 5, 6×6 cells", "random start, 6×6 cells"]
    coloured = [np.asarray(axis.images[0].get_array(), int) for axis in drawn[0].axes][1]
    assert np.abs(coloured[10, 10] - coloured[20, 5]).max() < 60 < np.abs(coloured[10, 10] - coloured[10, 50]).max()


def test_retrieval_frames_the_same_picture_and_counts_it(drawn):
    views = np.arange(12, dtype=np.uint8).reshape(2, 6, 1, 1, 1) + np.zeros((2, 6, 32, 32, 3), np.uint8)
    own, other = np.eye(6, dtype=np.float32), np.roll(np.eye(6, dtype=np.float32), 1, 0)
    retrieval.draw_retrieval(views, {"good": [own, own], "bad": [own, other]}, [0, 5], None)
    titles = [part.get_suptitle() for part in drawn[0].subfigs]
    assert titles == ["view", "good: the same picture comes first for 6 of 6 (100.0 %)",
                      "bad: the same picture comes first for 0 of 6 (0.0 %)"]
    good, bad = drawn[0].subfigs[1:]
    assert [bool(axis.patches) for axis in good.axes] == [True, False, False, False, False] * 2
    assert not bad.axes[0].patches and good.axes[0].get_title() == "1.000"
    assert np.asarray(bad.axes[0].images[0].get_array()).max() == 6 + 1  # the second view of picture 1
    assert "16.7 %" in drawn[0].get_suptitle()


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_titles_of_retrieval_are_whole_however_few_pictures_there_are(drawn, count):
    views, found = np.zeros((2, count, 32, 32, 3), np.uint8), np.ones((2, count, 4), np.float32)
    retrieval.draw_retrieval(views, {"iteration 100000": found, "random start": found}, np.arange(count), None)
    drawn[0].draw_without_rendering()
    titles = [part._suptitle.get_window_extent() for part in (drawn[0], *drawn[0].subfigs)]
    assert len(titles) == 4
    for number, title in enumerate(titles):
        assert drawn[0].bbox.x0 <= title.x0 and title.x1 <= drawn[0].bbox.x1 and title.y1 <= drawn[0].bbox.y1
        assert not any(title.overlaps(other) for other in titles[:number])
