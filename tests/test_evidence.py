"""benchmarks/evidence.py and its tables: its commands against the tools' own parsers; what is run once; arithmetic of the tables."""

import json
import sys
from pathlib import Path

import pytest
from test_reproduce_paper import overrides, parsed

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pretrain", "ablations", "probe", "few", "matches", "retrieval", "controls", "export", "seg", "det", "predict")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_the_tools_take_every_row_and_one_rows_output_is_the_nexts_input(monkeypatch, tmp_path):
    import evidence

    written, names = set(), []
    for part in PARTS:
        for row in evidence.rows(part, tmp_path / "data", tmp_path / "out", [0, 1], [0, 1, 2]):
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
                    assert (ROOT / arguments.config).is_file()
                    written.add(f"{overrides(arguments)['output_dir']}/latest")
                elif tool == "eval":
                    assert arguments.out == result and f"{Path(arguments.config).parent}/latest" == arguments.checkpoint
                elif tool == "export_finetune":
                    written.add(arguments.out)
                elif tool == "finetune_seg" and arguments.mode == "train":
                    written.add(f"{arguments.save_dir}/iter_300/model.pdparams")  # of the config, which the next one evaluates
                elif tool == "finetune_seg" and arguments.mode == "predict":
                    written.add(arguments.save_dir)
                elif tool == "finetune_det":
                    assert "random" in row.name or overrides(arguments)["pretrain_weights"] in written
    assert len(names) == len(set(names)) == 4 + 11 + 4 + 22 + 4 + 4 + 3 + 8 + 27 + 9 + 1
    assert "iters: 300" in (ROOT / "configs/seg/fcn_r18_camvid_cpu.yml").read_text()


def test_a_row_runs_once_and_again_where_it_failed(tmp_path):
    import evidence

    for folder in ("logs", "scores"):
        (tmp_path / folder).mkdir()
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good = evidence.Row("good", [["-c", count], ["-c", "print('mIoU 0.25, so and so')"]])
    assert evidence.run(good, tmp_path) is None and evidence.run(good, tmp_path) is None
    assert (tmp_path / "count").read_text() == "x"
    assert json.loads((tmp_path / "scores/good.json").read_text())["line"] == "mIoU 0.25, so and so"
    bad = evidence.Row("bad", [["-c", "import sys; sys.exit(3)"], ["-c", count]])
    for _ in range(2):
        assert "bad ended with status 3" in evidence.run(bad, tmp_path)
    assert (tmp_path / "count").read_text() == "x" and not (tmp_path / "scores/bad.json").exists()


def test_a_score_without_its_random_start_is_not_whole(tmp_path):
    import evidence

    (tmp_path / "a.json").write_text('{"trained": 0.5}')
    assert not evidence._whole(tmp_path / "a.json", ["tools/eval.py"])
    assert evidence._whole(tmp_path / "a.json", ["tools/eval.py", "--no-random"])


def test_the_tables_pair_seeds_and_mark_what_is_more_than_noise(tmp_path):
    import evidence_tables

    scores = tmp_path / "scores"
    scores.mkdir()
    for seed, (random, moco, densecl) in enumerate(((10, 20, 26), (12, 21, 27.5), (11, 19, 25))):
        (scores / f"seg_10_random_e{seed}.json").write_text(json.dumps({"line": f"x: mIoU {random / 100}, pixel accuracy 0.9"}))
        (scores / f"seg_10_moco_s0_e{seed}.json").write_text(json.dumps({"line": f"x: mIoU {moco / 100}, pixel accuracy 0.9"}))
        (scores / f"seg_10_densecl_s0_e{seed}.json").write_text(json.dumps({"line": f"x: mIoU {densecl / 100}, pixel"}))
        (scores / f"probe4_moco_s0_e{seed}.json").write_text(json.dumps({"trained": [0.2, 0.3, 0.4][seed]}))
        (scores / f"probe4_densecl_s0_e{seed}.json").write_text(json.dumps({"trained": 0.31, "random": 0.3}))
    (scores / "det_random_e0.json").write_text(json.dumps({"line": "bbox: AP 43.10, AP50 76.00, AP75 44.00"}))
    lines = list(evidence_tables.main_table(evidence_tables.found(tmp_path)))
    row = next(line for line in lines if "10 %" in line).split(" | ")
    assert row[1:] == ["11.0 ± 1.0", "20.0 ± 1.0", "26.2 ± 1.3", "**+9.0 ± 1.0**", "**+15.2 ± 1.0**", "**+6.2 ± 0.3**", "3 |"]
    probe = next(line for line in lines if "last stage" in line)
    assert "30.0 ± 0.0 | 30.0 ± 10.0 | 31.0 ± 0.0 | +0.0 ± 10.0 |" in probe and "| +1.0 ± 10.0 |" in probe
    assert any(line.startswith("| BCCD detection, box AP | 43.1 | – | – | – ") for line in lines)
