"""benchmarks/evidence.py and its tables: its commands against the tools' own parsers; what is run once; arithmetic of the tables."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_reproduce_paper import overrides, parsed

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pretrain", "probe", "matches", "retrieval", "controls", "export", "seg", "det", "predict", "ablations", "probe_ablations")
COUNTS = (4, 4, 4, 4, 3, 8, 18, 6, 1, 13, 26)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_tools_take_every_row_and_one_rows_output_is_the_nexts_input(monkeypatch, tmp_path):
    import evidence

    written, names = set(), []
    for part, count in zip(PARTS, COUNTS):
        rows = evidence.rows(part, tmp_path / "data", tmp_path / "out", 16, [0, 1])
        assert len(rows) == count, part
        for row in rows:
            names.append(row.name)
            for command, result in zip(row.commands, row.results or row.commands):
                assert (ROOT / command[0]).is_file()
                if command[0] == "benchmarks/side_by_side.py":
                    assert {word.partition("=")[2] for word in command if "=" in word} <= written
                    continue
                tool, arguments = parsed(monkeypatch, command)
                for option in ("checkpoint", "pretrained", "model_path"):
                    assert getattr(arguments, option, None) is None or getattr(arguments, option) in written, (row.name, option)
                if tool == "train":
                    values = overrides(arguments)
                    assert (values.get("model.loss_lambda") == 0) == ("moco" in row.name or row.name.endswith("lambda_0"))
                    assert (ROOT / arguments.config).is_file() and f"_s{values['seed']}" in row.name or part == "ablations"
                    written.add(f"{values['output_dir']}/epoch_{values['optim.epochs']}")
                elif tool == "eval":  # the checkpoint of the last epoch: `latest` is there before the run is whole
                    assert arguments.out == result and Path(arguments.config).parent == Path(arguments.checkpoint).parent
                    assert ("lambda_0" in row.name or "moco" in row.name) <= arguments.no_random
                elif tool == "export_finetune":
                    written.add(arguments.out)
                elif tool == "finetune_seg" and arguments.mode == "train":
                    start, share = row.name.split("_", 2)[2], row.name.split("_")[1]
                    assert f"_s{arguments.seed}" in start and f"camvid_{share}.txt" in str(arguments.opts)
                    assert arguments.pretrained == (None if "random" in start else str(tmp_path / f"out/{start}/seg.pdparams"))
                    written.add(f"{arguments.save_dir}/iter_300/model.pdparams")  # of the config, which the next one evaluates
                elif tool == "finetune_seg" and arguments.mode == "predict":
                    written.add(arguments.save_dir)
                elif tool == "finetune_det":
                    start, values = row.name.partition("_")[2], overrides(arguments)
                    assert start.endswith(f"_s{values['seed']}") and values.get("pretrain_weights") in (*written, None)
                    assert values.get("pretrain_weights") == (
                        None if "random" in start else str(tmp_path / f"out/{start}/det.pdparams"))
    assert len(names) == len(set(names))
    assert "iters: 300" in (ROOT / "configs/seg/fcn_r18_camvid_cpu.yml").read_text()


def test_a_row_runs_once_and_again_where_it_failed(tmp_path):
    import evidence

    for folder in ("logs", "scores"):
        (tmp_path / folder).mkdir()
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good = evidence.Row("seg_good", [["-c", count], ["-c", "print('a: mIoU 0.25, pixel accuracy 0.5'); print('and more')"]])
    assert evidence.run(good, tmp_path) is None and evidence.run(good, tmp_path) is None
    assert (tmp_path / "count").read_text() == "x"
    assert json.loads((tmp_path / "scores/seg_good.json").read_text())["score"] == "mIoU 0.25, pixel accuracy 0.5"
    for row, words in ((evidence.Row("bad", [["-c", "import sys; sys.exit(3)"], ["-c", count]]), "bad ended with status 3"),
                       (evidence.Row("det_mute", [["-c", "print('nothing')"]]), "det_mute ended without a score")):
        for _ in range(2):
            assert words in evidence.run(row, tmp_path)
        assert not (tmp_path / f"scores/{row.name}.json").exists()
    assert (tmp_path / "count").read_text() == "x"


def test_a_score_without_its_random_start_is_not_whole(tmp_path):
    import evidence

    (tmp_path / "a.json").write_text('{"trained": 0.5}')
    assert not evidence._whole(tmp_path / "a.json", ["tools/eval.py"])
    assert evidence._whole(tmp_path / "a.json", ["tools/eval.py", "--no-random"])


def test_the_script_prints_what_can_be_pasted_and_stops_at_a_part_that_failed(data_folder, tmp_path):
    def evidence(*arguments):
        return subprocess.run([sys.executable, "benchmarks/evidence.py", data_folder, *arguments, "--out", tmp_path], cwd=ROOT,
                              text=True, capture_output=True, timeout=60)

    printed = evidence("seg", "--only", "seg_10_random_s0", "--print")
    assert printed.returncode == 0 and printed.stdout.count("\n") == 3 and printed.stdout.startswith("# seg_10_random_s0\n")
    assert len((tmp_path / "camvid_10.txt").read_text().splitlines()) == 37
    shown = {name: set((tmp_path / f"{name}.txt").read_text().splitlines())
             for name in ("unlabelled", "unseen", "scenes_bank", "scenes_query")}
    assert [len(lines) for lines in shown.values()] == [1867, 233, 117, 116]
    assert not shown["unlabelled"] & shown["unseen"] and not shown["scenes_bank"] & shown["scenes_query"]
    assert {f"camvid/{line.split()[0]}" for name in ("scenes_bank", "scenes_query") for line in shown[name]} == shown["unseen"]
    assert evidence("seg", "--only", "seg_10", "--print").returncode == 2
    failed = evidence("export", "det", "--only", "export_seg_moco16_s0", "det_moco16_s0")  # there is no checkpoint to export
    assert failed.returncode == 1 and "export_seg_moco16_s0 ended with status 1" in failed.stderr
    assert not (tmp_path / "logs/det_moco16_s0.log").exists()


def test_masks_stand_side_by_side_with_their_share_of_right_pixels(tmp_path):
    def draw(*masks):
        return subprocess.run([sys.executable, "benchmarks/side_by_side.py", "--list", tmp_path / "list.txt", "--classes",
                               tmp_path / "classes.txt", "--count", "2", "--out", tmp_path / "out.svg", *masks], cwd=ROOT, text=True,
                              capture_output=True, timeout=60)

    truth = np.zeros((8, 10), np.uint8)
    truth[:4], truth[7] = 1, 255
    half = np.ones_like(truth)
    for folder, content in (("labels", truth), ("good", truth), ("half", half)):
        (tmp_path / folder).mkdir()
        for name in "ab":
            Image.fromarray(content).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "list.txt").write_text("labels/a.png labels/a.png\nlabels/b.png labels/b.png\n")
    (tmp_path / "classes.txt").write_text("the road\ntraffic light\n")
    assert draw(f"good={tmp_path / 'good'}", f"half={tmp_path / 'half'}").returncode == 0
    text = (tmp_path / "out.svg").read_text()
    for words, count in (("good: 100 % right", 2), ("half: 57 % right", 2), ("traffic light", 1)):  # 4 of 7 rows
        assert text.count(f"<!-- {words} -->") == count
    (tmp_path / "half/b.png").unlink()
    missing = draw(f"half={tmp_path / 'half'}")
    assert missing.returncode == 1 and missing.stderr.startswith(f"error: {tmp_path / 'half/b.png'}: there is no such mask")


def test_the_tables_pair_seeds_and_mark_what_is_more_than_noise(tmp_path):
    import evidence_tables

    scores = tmp_path / "scores"
    scores.mkdir()

    def write(name, **result):
        (scores / f"{name}.json").write_text(json.dumps(result))

    for seed, (random, moco, densecl) in enumerate(((10, 20, 26), (12, 21, 27.5), (11, 19, 25))):
        write(f"seg_10_random_s{seed}", score=f"mIoU {random / 100}, pixel accuracy")
        write(f"seg_10_moco16_s{seed}", score=f"mIoU {moco / 100}, pixel accuracy")
        write(f"seg_10_densecl16_s{seed}", score=f"mIoU {densecl / 100}, pixel accuracy")
        write(f"seg_10_densecl60_s{seed}", score="mIoU 0.99, pixel accuracy")  # of another budget
        write(f"probe4_moco16_s{seed}", trained=[0.2, 0.3, 0.4][seed])
        write(f"probe4_densecl16_s{seed}", trained=0.31, random=0.3)
    write("det_random_s0", score="bbox: AP 43.10")
    write("det_random_s1", score="bbox: AP 50.00")  # nothing that was trained stands beside it
    write("matches_camvid_densecl16_s0", trained=0.4, random=0.3, details={
        start: {"shown": {evidence_tables.MOVED: share}} for start, share in (("trained", 0.25), ("random", 0.1))})
    lines = list(evidence_tables.main_table(evidence_tables.found(tmp_path, 16)))
    row = next(line for line in lines if "10 %" in line).split(" | ")
    assert row[1:] == ["11.0 ± 1.0", "20.0 ± 1.0", "26.2 ± 1.3", "**+9.0 ± 1.0**", "**+15.2 ± 1.0**", "**+6.2 ± 0.3**", "3 |"]
    probe = next(line for line in lines if "last stage" in line)
    assert "30.0 ± 0.0 | 30.0 ± 10.0 | 31.0 ± 0.0 | +0.0 ± 10.0 |" in probe and "| +1.0 ± 10.0 |" in probe
    assert not any("BCCD" in line for line in lines)
    write("det_moco16_s0", score="bbox: AP 44.00")
    assert "| BCCD detection, box AP | 43.1 | 44.0 | – | +0.9 | – | – | 0–1 |" in evidence_tables.main_table(
        evidence_tables.found(tmp_path, 16))
    assert "| … where the own position is wrong | 10.0 | – | 25.0 | – | +15.0 | – | 0–1 |" in lines
    assert "| random start | – | 30.0 | 30.0 | 10.0 | – | – |" in evidence_tables.ablation_table(tmp_path)
