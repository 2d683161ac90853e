"""tools/reproduce_paper.sh: what it prints, against the tools' own parsers and configs; and its runs, with a script that notes
its arguments in place of python."""

import argparse
import importlib
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "tools" / "reproduce_paper.sh")
FOLDERS = {"COCO": ["train2017", "val2017", "annotations"], "IMAGENET": ["train", "val"], "VOC": ["VOC2007", "VOC2012"],
           "CITYSCAPES": ["leftImg8bit", "gtFine"], "SBD": ["dataset/cls"]}
NOT_OF_THE_TABLE = {"configs/det/mask_rcnn_r50_fpn_coco_2x.yml", "configs/seg/fcn_r101-d8_cityscapes_40k_769.yml",
                    "configs/probes/linear_places205.yaml", "configs/probes/dense_camvid.yaml"}  # no number of the paper is known
TWO = "prepare.cityscapes", "pretrain.moco_coco_800"


class Paper:
    """The script, with its data (of names that a shell and YAML have to quote) and a `python` that notes its arguments."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "the paper's: out"
        self.data = {name: folder / f"{name} #1" for name in FOLDERS}
        for name, parts in FOLDERS.items():
            for part in parts:
                (self.data[name] / part).mkdir(parents=True)
        self.python("")

    def python(self, script):
        """What the interpreter does after it has noted its arguments; `-c` (is a snapshot whole?) is for the real one."""
        path = self.folder / "py thon"
        path.write_text(f'#!/usr/bin/env bash\nif [ "$1" = -c ]; then exec {shlex.quote(sys.executable)} "$@"; fi\n'
                        f'echo "${{CUDA_VISIBLE_DEVICES-all}} ${{*@Q}}" >>{shlex.quote(str(self.folder))}/calls\n{script}\n')
        path.chmod(0o755)

    def environment(self, **settings):
        found = {**os.environ, "PYTHON": self.folder / "py thon", "OUT": self.out, "GPUS": "4,5,6,7", **self.data, **settings}
        found.pop("CUDA_VISIBLE_DEVICES", None)
        return {name: str(value) for name, value in found.items()}

    def __call__(self, *arguments, **settings):
        return subprocess.run(["bash", SCRIPT, *arguments], env=self.environment(**settings), text=True, capture_output=True,
                              timeout=60, cwd=self.folder)

    def start(self, *arguments):
        return subprocess.Popen(["bash", SCRIPT, *arguments], env=self.environment(), text=True, cwd=self.folder,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def calls(self):
        """[[cards, argument, …]] since the last question."""
        path = self.folder / "calls"
        found = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def commands(self, *steps, **settings):
        """{step: [cards, argument, …]} as printed."""
        result = self("--print", *steps, **settings)
        assert result.returncode == 0, result.stderr
        found, words = {}, []
        for line in result.stdout.splitlines()[2:]:
            if line.startswith("# "):
                name = line[2:]
            elif name != "table":
                words = shlex.split(line)
                assert words[-3:] == ["|", "tee", f"{self.out}/log/{name}.txt"]
                cards = words.pop(1).partition("=")[2] if words[0] == "env" else "all"
                python = words.index(str(self.folder / "py thon"))
                found[name] = [cards, *words[python + 1:-3]]
        return found

    def done(self):
        return sorted(path.name for path in (self.out / "done").iterdir())


@pytest.fixture
def paper(tmp_path):
    return Paper(tmp_path)


def test_every_config_of_the_paper_is_named_and_every_file_is_there(paper):
    commands = paper.commands()
    words = {word for command in commands.values() for word in command}
    files = {word for word in words if word.startswith(("configs/", "tools/"))}
    assert all((ROOT / file).is_file() for file in files)
    patterns = "*r50*.yaml", "*r101*.yaml", "det/*r50*", "det/*r101*", "seg/*r50*", "seg/*r101*", "probes/*"
    wanted = {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert {file for file in files if file.startswith("configs/")} == wanted - NOT_OF_THE_TABLE
    assert sum(name.startswith("voc_detection") and name.endswith("train") for name in commands) == 6 * 5


def parsed(monkeypatch, command):
    """The tool's own parser on a printed command: (tool, what it found)."""
    class Parsed(Exception):
        pass

    def parse_args(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    words = [word for word in command if word != "all"]
    start = next(i for i, word in enumerate(words) if word.startswith("tools/"))
    tool, parse = Path(words[start]).stem, argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[start:])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        module = importlib.import_module(tool)
        try:
            module.main()
        except Parsed as found:
            return tool, found.args[0]
    raise AssertionError(tool)


def overrides(arguments):
    items = [item.partition("=") for group in arguments.override for item in group]
    return {key: yaml.safe_load(value) for key, _, value in items}


def config_text(path):
    """A config of PaddleSeg and the ones that it is based on, its own lines first."""
    text = path.read_text()
    base = re.search(r"^_base_: (.+)", text, re.M)
    return text + ("\n" + config_text(path.parent / base.group(1)) if base else "")


@pytest.mark.parametrize("cards", [1, 8])
def test_the_tools_take_what_is_printed_and_one_steps_output_is_the_nexts_input(paper, monkeypatch, cards):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    commands = paper.commands(GPUS=",".join(map(str, range(cards))))
    found = {name: parsed(monkeypatch, command)[1] for name, command in commands.items()}
    runtime = yaml.safe_load((ROOT / "configs/det/base/runtime.yml").read_text())
    written = set()
    for name, arguments in found.items():
        task, model, *_ = name.split(".")
        if task == "pretrain":
            values = overrides(arguments)
            assert arguments.resume == "auto"
            written.add(f"{values['output_dir']}/latest")
        elif task == "export":
            assert arguments.checkpoint in written and f"/{model}/" in arguments.checkpoint
            written.add(arguments.out)
        elif "protocol" in vars(arguments):
            assert arguments.checkpoint in written and Path(arguments.out).parent == paper.out / "log"
        elif "override" in vars(arguments):  # detection
            values = overrides(arguments)
            assert {key for key in values if "." not in key} <= runtime.keys()
            assert Path(values["EvalDataset.dataset_dir"], "annotations" if "coco" in task else "VOC2012").is_dir()
            final = f"{values['save_dir']}/{Path(arguments.config).stem}/model_final.pdparams"
            if arguments.mode == "train":
                assert values["pretrain_weights"] in written and model in values["pretrain_weights"] and final not in written
                assert f"seed_{values['seed']}" in name.split(".")
                written.add(final)
            else:
                assert values["weights"] == final and final in written
        elif "save_dir" in vars(arguments):  # segmentation
            iterations = re.search(r"^iters: (\d+)", config_text(ROOT / arguments.config), re.M).group(1)
            if arguments.mode == "train":
                assert arguments.pretrained in written and model in arguments.pretrained
                assert cards * arguments.batch_size == 16
                written.add(f"{arguments.save_dir}/iter_{iterations}/model.pdparams")
            else:
                assert arguments.model_path in written
            assert ("r101" in arguments.config) == ("r101" in model) and Path(arguments.dataset_root).is_dir()


@pytest.mark.parametrize("cards", [1, 2, 4, 8, 16])
def test_the_batch_of_pretraining_stays_that_of_the_recipe(paper, monkeypatch, capsys, cards):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train

    commands = paper.commands("pretrain", GPUS=",".join(map(str, range(cards))))
    assert len(commands) == 6
    for name, command in commands.items() if cards == 8 else [commands.popitem()]:
        monkeypatch.setattr(sys, "argv", [*command[command.index("tools/train.py"):], "--print-config"])
        train.main()
        config = yaml.safe_load(capsys.readouterr().out)
        data, optim = config["data"], config["optim"]
        assert data["batch_size"] * cards * optim["accumulate"] == 256 and data["batch_size"] <= 32
        assert config["output_dir"] == f"{paper.out}/{name.replace('.', '/')}" and Path(data["root"]).is_dir()
        assert ("moco" in name) == (config["model"]["loss_lambda"] == 0) and (cards == 1) == (config["model"]["bn_groups"] == 4)
        source, epochs = re.match(r"pretrain\..*_(coco|imagenet)_(\d+)", name).groups()
        assert optim["epochs"] == int(epochs) and optim["lr"] == {"coco": 0.3, "imagenet": 0.03}[source]
        assert source in str(data["root"]).lower()


def test_all_steps_run_in_the_order_of_the_list_and_never_twice(paper):
    printed, listed = paper.commands(), paper("--list").stdout.splitlines()
    result = paper("--run")
    assert result.returncode == 0, result.stderr
    assert paper.calls() == list(printed.values())
    assert [line.split()[-1] for line in listed] == [*printed, "table"] and paper.done() == sorted(printed)
    assert "| VOC detection AP |" in result.stdout
    assert all(line.startswith(("done ", "always ")) for line in paper("--list").stdout.splitlines())
    assert paper("--run").returncode == 0 and paper.calls() == []
    assert paper.commands() == {}


def test_a_failing_step_ends_it_and_the_same_command_goes_on(paper):
    paper.python('case $* in *train.py*) exit 7 ;; esac')
    result = paper("--run", *TWO)
    assert result.returncode == 7 and "error: pretrain.moco_coco_800 ended with status 7;" in result.stderr
    assert paper.done() == ["prepare.cityscapes"] and len(paper.calls()) == 2
    paper.python("")
    assert paper("--run", *TWO).returncode == 0
    (call,) = paper.calls()
    assert "tools/train.py" in call and paper.done() == sorted(TWO)


def wait_for(path):
    for _ in range(500):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def test_it_goes_on_after_kill_9_and_not_beside_what_outlived_it(paper):
    running = paper.folder / "running"
    paper.python(f'case $* in *train.py*) echo $$ >{shlex.quote(str(running))}; exec sleep 60 ;; esac')
    first = paper.start("--run", *TWO)
    child = int(wait_for(running))
    assert "still works there" in paper("--run", *TWO).stderr
    first.kill()  # the script alone
    first.wait()
    refused = paper("--run", *TWO)
    assert refused.returncode == 1 and "a command of another run still works there" in refused.stderr
    os.kill(child, signal.SIGKILL)
    paper.calls()

    running.unlink()
    second = paper.start("--run", *TWO)
    wait_for(running)
    os.killpg(second.pid, signal.SIGKILL)  # all of it
    second.wait()
    paper.python("")
    assert paper.done() == ["prepare.cityscapes"]
    paper.calls()
    assert paper("--run", *TWO).returncode == 0 and len(paper.calls()) == 1 and paper.done() == sorted(TWO)


def test_fine_tuning_goes_on_from_the_last_whole_snapshot(paper):
    whole = pickle.dumps({"last_epoch": 8}, protocol=4)
    detection = paper.out / "voc_detection/moco_coco_800/seed_3/faster_rcnn_r50_c4_voc_24k"
    segmentation = paper.out / "voc_segmentation/moco_coco_800"
    for stem, cut in ((detection / "7", 0), (detection / "11", 0), (detection / "15", 3), (segmentation / "iter_9000/model", 0),
                      (segmentation / "iter_20000/model", 0)):
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".pdparams").write_bytes(whole)
        stem.with_suffix(".pdopt").write_bytes(whole[:len(whole) - cut])
    for name, expected in (("voc_detection.moco_coco_800.seed_3.train", detection / "11"),
                           ("voc_segmentation.moco_coco_800.train", segmentation / "iter_9000")):
        command = paper.commands(name)[name]
        assert command[command.index("--resume") + 1] == str(expected)
    name = "voc_detection.moco_coco_800.seed_2.train"
    assert "--resume" not in paper.commands(name)[name]


@pytest.mark.parametrize("arguments, settings, status, words", [
    ([], {}, 2, "bash tools/reproduce_paper.sh --run [STEP…]"),
    (["--runs"], {}, 2, "bash tools/reproduce_paper.sh --run [STEP…]"),
    (["--run", "pretrian"], {}, 2, "error: pretrian is no step"),
    (["--list"], {"GPUS": "0,1,2"}, 1, "3 cards cannot share a batch of 16 evenly; give 1, 2, 4, 8 or 16"),
    (["--list"], {"GPUS": "0,0"}, 1, "GPUS=0,0: give the numbers of the cards, each once"),
    (["--run"], {"PYTHON": "/none/python"}, 1, "PYTHON=/none/python is no command"),
    (["--run"], {"VOC": "/none"}, 1, "VOC=/none has no folder VOC2007; set VOC to the folder of VOC2007, VOC2012"),
    (["--run"], {"COCO": "/none"}, 1, "COCO=/none has no folder train2017"),
    (["--run"], {"IMAGENET": "/none"}, 1, "IMAGENET=/none has no folder train"),
    (["--run"], {"CITYSCAPES": "/none"}, 1, "CITYSCAPES=/none has no folder leftImg8bit"),
    (["--run"], {"SBD": "/none"}, 1, "SBD=/none has no folder dataset/cls"),
    (["--run", "export"], {}, 1, "needs pretrain.moco_coco_800, which is not done"),
])
def test_refusals_come_before_anything_runs(paper, arguments, settings, status, words):
    result = paper(*arguments, **settings)
    assert result.returncode == status and words in result.stderr, result.stderr
    assert status == 2 or len(result.stderr.splitlines()) == 1
    assert paper.calls() == []


def test_the_help_ends_with_the_settings(paper):
    lines = paper().stderr.splitlines()
    assert lines[0].startswith("The paper's table") and lines[-1].split() == ["PYTHON", "the", "interpreter", "(default", "python)"]


def test_data_is_asked_for_only_where_a_step_needs_it(paper):
    none = {"IMAGENET": "/none", "VOC": "/none", "CITYSCAPES": "/none", "SBD": "/none"}
    assert paper("--run", "pretrain.moco_coco_800", **none).returncode == 0
    (paper.data["VOC"] / "VOC2012" / "SegmentationClassAug").mkdir()
    assert paper("--run", "prepare.voc_segmentation", SBD="/none").returncode == 0
    assert "--sbd" not in paper.calls()[-1]


def test_the_table_has_the_results_that_are_there(paper):
    empty = paper("--run", "table").stdout
    for document in ("docs/reproduce.md", "docs/reproduce_cn.md"):
        assert empty in (ROOT / document).read_text(), f"{document} shows another table"
    paper.python(r"""case $* in
        *eval.py*) printf 'knn: trained 48.4 %%, chance 0.1 %%\n  k = 10: trained 48.2 %%\n  k = 20: trained 48.4 %%\n' ;;
        *finetune_seg*train*) echo "logs of trainings do not count: mIoU 0.1" ;;
        *finetune_seg*eval*) echo "x/model.pdparams: mIoU 0.6712, pixel accuracy 0.9012" ;;
        *mask_rcnn*eval*) printf 'bbox: AP 39.54, AP50 59.00, AP75 42.00\nmask: AP 35.55, AP50 57.00, AP75 38.00\n' ;;
        *eval*seed_3/*) exit 1 ;;
        *eval*seed_*) all=$*; seed=${all##*seed_}; printf 'bbox: AP 9.99, AP50 9.99, AP75 9.99\n'
            echo "bbox as VOC 2007 counts: AP 5${seed%%/*}.20, AP50 80.10, AP75 60.04" ;; esac""")
    first = ["prepare", "pretrain.moco_coco_800", "export.moco_coco_800", "voc_detection.moco_coco_800"]
    assert paper("--run", *first).returncode == 1  # at seed_3
    more = ["pretrain.densecl_imagenet_200", "coco.moco_coco_800", "voc_segmentation.moco_coco_800", "knn_imagenet"]
    result = paper("--run", *more, "table")
    assert result.returncode == 0, result.stderr
    lines = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines() if line.startswith("|")]
    rows = {line[1]: line[2:-1] for line in lines}
    assert rows["VOC detection AP"] == ["51.2 (3) / 54.7", "– / 56.7", "– / 57.2", "– / 57.0", "– / 58.7", "– / 61.3"]
    assert rows["… AP50"][:2] == ["80.1 (3) / 81.0†", "– / 81.7†"] and rows["… AP75"][0] == "60.0 (3) / 60.6†"
    assert rows["VOC segmentation mIoU"][0] == "67.1 / 64.5" and rows["Cityscapes mIoU"][1] == "– / 75.6†"
    assert rows["COCO box AP"][0] == "39.5 / 38.5†" and rows["COCO mask AP"][0] == "35.5 / 34.8†"
    assert rows["ImageNet kNN, k = 20"][4] == "48.4 / 48.5‡"
