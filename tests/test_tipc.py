"""test_tipc/: the lite chain as it is, what is composed for GPUs (recorded by a stub in place of python), and what is refused."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppdensecl.engine.logging import format_line

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "test_tipc" / "configs").glob("*/*.txt"))
TRAINED = ("lite_train_lite_infer", "lite_train_whole_infer", "whole_train_whole_infer")
HEADINGS = {1: "train_params", 23: "eval_params", 27: "infer_params", 53: "train_benchmark_params"}


class Project:
    """A folder with this project's tools and test_tipc, so that nothing is written to the clone; `python3` is the tests' own,
    or a shell script."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        for name in ("tools", "configs", "deploy", "ppdensecl"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "test_tipc", folder / "test_tipc", ignore=shutil.ignore_patterns("output"))
        self.bin.mkdir()
        self.python(f'exec {shlex.quote(sys.executable)} "$@"')

    def python(self, script):
        path = self.bin / "python3"
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def record(self, script=""):
        """`python3` only notes its arguments (and cards), then runs `script`."""
        self.python(f'echo "${{CUDA_VISIBLE_DEVICES:-}} $*" >>{self.folder}/calls\n{script}')

    def calls(self):
        """[(cards, arguments)], but for the question whether there is a GPU."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.partition(" ")[::2] for line in lines if " -c import " not in line]

    def config(self, model="densecl_r18", name="train_infer_python.txt", **changes):
        """Path of a copy of a config with lines changed: line_16="norm_train:…"."""
        lines = (ROOT / "test_tipc" / "configs" / model / name).read_text().splitlines()
        for line, text in changes.items():
            lines[int(line[len("line_"):]) - 1] = text
        path = self.folder / "config.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def run(self, script, *arguments, **environment):
        return subprocess.run(["bash", f"test_tipc/{script}", *map(str, arguments)], cwd=self.folder, text=True, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **environment})

    def chain(self, config, mode="lite_train_lite_infer", *more):
        return self.run("test_train_inference_python.sh", config, mode, *more)

    def results(self, model="densecl_r18", mode="lite_train_lite_infer"):
        return (self.folder / "test_tipc" / "output" / model / mode / "results_python.log").read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def fields(path):
    return [line.partition(":")[::2] for line in path.read_text().splitlines()]


def test_the_lite_chain(project):
    config = project.config(line_43="--cpu-threads:2", line_44="--batch-size:2")  # a quarter of the ways of inference
    prepared = project.run("prepare.sh", config, "lite_train_lite_infer")
    assert prepared.returncode == 0, prepared.stdout
    data = project.folder / "test_tipc" / "output" / "data"
    assert [len(list((data / part).iterdir())) for part in ("train", "infer")] == [16, 8]
    assert sum(file.stat().st_size for file in data.rglob("*.png")) < 20e6
    done = project.chain(config)
    assert done.returncode == 0, done.stdout[-3000:]
    results = project.results()
    assert len(results) == 5
    assert all(line.startswith("Run successfully with command - densecl_r18 - ") for line in results)
    # Inference with oneDNN and without says the same.
    folder = project.folder / "test_tipc" / "output" / "densecl_r18" / "lite_train_lite_infer"
    outputs = sorted(folder.glob("*_python_infer_*.npz"))
    assert len(outputs) == 2
    compared = compare(*outputs)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    # The line that Paddle's benchmarks read.
    log = (folder / "norm_train_gpus_-1_autocast_null.log").read_text()
    assert re.search(r" loss: \d+\.\d+, .*ips: \d+\.\d+ images/sec", log)


def test_fixed_weights_give_the_features_that_are_kept(project):
    config = project.config(line_42="--mkldnn:False", line_43="--cpu-threads:2", line_44="--batch-size:2")
    assert project.run("prepare.sh", config, "whole_infer", WEIGHTS="fixed").returncode == 0
    done = project.chain(config, "whole_infer")
    assert done.returncode == 0, done.stdout[-3000:]
    [found] = (project.folder / "test_tipc" / "output" / "densecl_r18" / "whole_infer").glob("*.npz")
    compared = compare(ROOT / "test_tipc" / "results" / "densecl_r18_fp32.npz", found)
    assert compared.returncode == 0 and "in 8 pictures" in compared.stdout, compared.stdout + compared.stderr


def test_a_broken_training_ends_the_chain_and_tells_why(project):
    config = project.config(line_16="norm_train:tools/train.py -c configs/nothing.yaml")
    done = project.chain(config)
    assert done.returncode == 1
    [line] = project.results()  # nothing is scored or exported that was not trained
    assert line.startswith("Run failed with command - densecl_r18 - python3 tools/train.py -c configs/nothing.yaml -o device=cpu")
    assert "configs/nothing.yaml: cannot read the config" in done.stdout and "0 of 1 commands ended well" in done.stdout


@pytest.mark.parametrize("broken, count", [("eval.py", 11), ("export_model.py", 3), ("--batch-size=2", 11)])
def test_any_broken_command_makes_the_chain_fail(project, broken, count):
    project.record(f"case $* in *{broken}*) exit 3;; esac")
    done = project.chain(project.config())
    assert done.returncode == 1
    results = project.results()
    assert len(results) == count
    for line in results:
        assert line.startswith("Run failed with" if broken in line else "Run successfully with"), line


def test_the_same_command_twice_forgets_the_first_results(project):
    project.record("exit 1")
    project.chain(project.config())
    project.record()
    assert project.chain(project.config()).returncode == 0
    assert all(line.startswith("Run successfully") for line in project.results())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_have_the_form_that_runners_read_by_line_numbers(path):
    lines = path.read_text().splitlines()
    assert len(lines) == 60
    for number, line in enumerate(lines, 1):
        assert line and line == line.strip() and line.count(":") <= 1, f"{path}:{number}"
        assert (line == "##") == (number in (14, 22, 26, 36, 52))
        assert (number in HEADINGS) == line.startswith("="), f"{path}:{number}"
        assert line.strip("=") == HEADINGS.get(number, line)
    keys, values = zip(*fields(path))
    assert keys[1:5] == ("model_name", "python", "gpu_list", "-o device")
    assert values[1] == path.parent.name and len(values[3].split("|")) == len(values[4].split("|"))
    for number in (7, 9):
        assert {part.partition("=")[0] for part in values[number - 1].split("|")} == set(TRAINED)
    assert keys[14:16] == ("trainer", values[14]) and keys[23] == "eval" and keys[29] == "norm_export"
    assert [keys[number - 1] for number in (11, 12, 37, 38, 39, 40)] == [
        "train_model_name", "train_infer_img_dir", "infer_model", "infer_export", "infer_quant", "inference"]
    assert keys[53:] == ("batch_size", "fp_items", "epoch", "profiler_options", "flags", "model_type", "num_workers")
    for number in (16, 24, 30, 38, 40):  # files that are there
        for word in values[number - 1].split():
            assert not re.match(r"(tools|configs|deploy)/", word) or (ROOT / word).is_file(), word


def test_every_model_has_every_chain():
    found = {(path.parent.name, path.name) for path in CONFIGS}
    assert found == {(model, f"train_{chain}infer_python.txt") for model in ("densecl_r18", "densecl_r50", "moco_v2_r50")
                     for chain in ("", "gpu_", "amp_", "fleet_", "to_static_")}


def test_one_and_several_cards(project):
    project.record()
    assert project.chain(project.config("densecl_r50", "train_gpu_infer_python.txt")).returncode == 0
    calls = project.calls()
    trainings = [call for call in calls if "tools/train.py" in call[1]]
    assert [cards for cards, _ in trainings] == ["0", os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    assert trainings[0][1].startswith("tools/train.py -c configs/densecl_r50.yaml ")
    assert trainings[1][1].startswith("-m paddle.distributed.launch --devices=0,1 --log_dir=./test_tipc/output/")
    for _, command in trainings:
        assert "-o device=gpu -o output_dir=./test_tipc/output/densecl_r50/lite_train_lite_infer/norm_train_gpus_0" in command
        assert "-o optim.epochs=1 -o data.batch_size=4" in command and "optim.amp" not in command
    others = [call for call in calls if "tools/train.py" not in call[1]]
    assert len(others) == 2 * (2 + 4 + 2)  # eval, export, inference on the CPU and the card
    assert {cards for cards, _ in others} == {"0"}
    assert sum("--device=gpu --tensorrt=False --precision=fp32" in command for _, command in others) == 2 * 2


def test_amp(project):
    project.record()
    assert project.chain(project.config(name="train_amp_infer_python.txt")).returncode == 0
    trainings = [command for _, command in project.calls() if "tools/train.py" in command]
    assert len(trainings) == 2 and all("-o optim.amp=float16 " in command for command in trainings)


def test_several_machines(project):
    project.record()
    done = project.chain(project.config(name="train_fleet_infer_python.txt"))
    assert done.returncode == 0, done.stdout
    [(_, command)] = project.calls()  # this is not the first of the machines: what was trained is there
    assert command.startswith("-m paddle.distributed.launch --ips=192.168.0.1,192.168.0.2 --devices=0,1 ")
    here = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()[:1]
    if here:
        project.chain(project.config(name="train_fleet_infer_python.txt", line_4=f"gpu_list:{here[0]},192.168.0.2;0,1"))
        assert sum("infer.py" in command for _, command in project.calls()) == 6


@pytest.mark.parametrize("name", ["train_infer_python.txt", "train_amp_infer_python.txt", "train_to_static_infer_python.txt"])
def test_composed_trainings_are_what_the_tool_takes(project, run_tool, name):
    project.record()
    for model in ("densecl_r18", "densecl_r50", "moco_v2_r50"):
        assert project.chain(project.config(model, name), "whole_train_whole_infer").returncode == 0
    trainings = [command for _, command in project.calls() if "tools/train.py" in command]
    for command in trainings:
        done = run_tool("train.py", *command.partition("tools/train.py ")[2].split(), "--print-config")
        assert done.returncode == 0, done.stderr
        assert "batch_size: 32\n" in done.stdout and "root: ./test_tipc/output/data/train\n" in done.stdout
        assert ("amp: float16\n" if "amp" in name else "amp: 'off'\n") in done.stdout


def test_amp_is_for_gpus(project):
    import paddle

    if paddle.is_compiled_with_cuda():
        pytest.skip("this paddlepaddle has CUDA")
    done = project.chain(project.config(name="train_amp_infer_python.txt"))
    assert done.returncode == 1 and "config.txt is for GPUs (line 4), of which Paddle sees none" in done.stdout
    assert project.run("prepare.sh", project.config(), "lite_train_lite_infer").returncode == 0
    done = project.chain(project.config(name="train_amp_infer_python.txt", line_4="gpu_list:-1", line_5="-o device:cpu"))
    assert done.returncode == 1 and "'optim.amp' is 'float16', but" in done.stdout and "Traceback" not in done.stdout


def test_whole_infer_takes_weights_that_are_there(project, tmp_path):
    project.record()
    weights = tmp_path / "my.pdparams"
    weights.write_bytes(b"weights")
    none = project.run("prepare.sh", project.config(), "whole_infer")
    assert none.returncode == 1 and "WEIGHTS=FILE" in none.stdout
    config = project.config()
    assert project.run("prepare.sh", config, "whole_infer", WEIGHTS=str(weights)).returncode == 0
    assert (project.folder / "test_tipc/output/densecl_r18/pretrained.pdparams").read_bytes() == b"weights"
    (project.folder / "calls").unlink()
    assert project.chain(config, "whole_infer", "3").returncode == 0
    cards, export = project.calls()[0]
    target = "./test_tipc/output/densecl_r18/pretrained"
    assert cards == "3"
    assert export == f"tools/export_model.py -c configs/densecl_r18_demo.yaml --pretrained={target} --output-dir={target}"
    assert len(project.calls()) == 9 and all(f"--model-dir={target} " in command for _, command in project.calls()[1:])


def test_whole_takes_pictures_of_ones_own(project, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "one.png").write_bytes(b"picture")
    done = project.run("prepare.sh", project.config(), "whole_train_whole_infer", TRAIN_DATA="own", INFER_DATA=str(own))
    assert done.returncode == 0, done.stdout
    for part in ("train", "infer"):
        assert (project.folder / "test_tipc" / "output" / "data" / part).resolve() == own
    project.run("prepare.sh", project.config(), "lite_train_lite_infer")
    assert [path.name for path in own.iterdir()] == ["one.png"]  # the link went, not what is behind it
    done = project.run("prepare.sh", project.config(), "whole_train_whole_infer", TRAIN_DATA="nothing")
    assert done.returncode == 1 and "nothing is no folder" in done.stdout


@pytest.mark.parametrize("line, text, says", [
    (17, "", "config.txt:17 is blank"), (16, "norm_train:tools/train.py --x=a:b", "config.txt:16 has a second colon"),
    (7, "-o optim.epochs:whole_train_whole_infer=2", "has no value for lite_train_lite_infer"),
    (15, "trainer:to_static_train", "trainer to_static_train of line 15 has no command"),
    (4, "gpu_list:0|0,1", "lines 4 and 5"), (15, "trainer:", "asks for no command"),
])
def test_bad_configs_are_refused(project, line, text, says):
    project.record()
    done = project.chain(project.config(**{f"line_{line}": text}))
    assert done.returncode == 1 and says in done.stdout
    assert not (project.folder / "calls").exists()


def test_unknown_modes_get_the_usage(project):
    for script in ("prepare.sh", "test_train_inference_python.sh"):
        done = project.run(script, project.config(), "lite_train")
        assert done.returncode == 2 and "whole" in done.stdout


def speed_lines():
    times = {"avg_reader_cost": 0.1, "avg_batch_cost": 0.2, "avg_samples": 8.0, "eta": "0:00:01"}
    return "\n".join(format_line(1, 1, step, 5, 0.03, {"loss": 9.0 - step, "loss_global": 1.0}, {**times, "avg_ips": 10.0 * step})
                     for step in range(1, 6))


def record_speed(project):
    project.record(f"""case $* in
        *tools/train.py*) cat <<'END'\n{speed_lines()}\nEND\n;;
        *speed_log.py*) exec {shlex.quote(sys.executable)} "$@";;
        esac""")


def test_benchmark_writes_the_speed(project):
    record_speed(project)
    done = project.run("benchmark_train.sh", project.config(), "benchmark_train")
    assert done.returncode == 0, done.stdout
    [found] = (project.folder / "test_tipc" / "output" / "benchmark" / "index").iterdir()
    assert found.name == "ppdensecl_densecl_r18_bs8_fp32_DP_N1C1_speed"
    speed = json.loads(found.read_text())
    assert (speed["ips"], speed["convergence_value"]) == (40.0, 4.0)  # the mean of 30, 40 and 50
    assert (speed["batch_size"], speed["fp_item"], speed["device_num"]) == (8, "fp32", "N1C1")
    [training] = [command for _, command in project.calls() if "tools/train.py" in command]
    assert "-o log.interval=1 -o device=cpu " in training
    assert "-o optim.epochs=1 -o optim.amp=off -o data.batch_size=8" in training


def test_benchmark_on_eight_cards(project):
    record_speed(project)
    done = project.run("benchmark_train.sh", project.config(name="train_gpu_infer_python.txt"), "benchmark_train",
                       "dynamic_bs64_fp16_DP_N1C8", BENCHMARK_LOG_DIR="logs")
    assert done.returncode == 0, done.stdout
    assert [path.name for path in (project.folder / "logs" / "index").iterdir()] == [
        "ppdensecl_densecl_r18_bs64_fp16_DP_N1C8_speed"]
    [training] = [command for _, command in project.calls() if "tools/train.py" in command]
    assert "--devices=0,1,2,3,4,5,6,7 " in training and "-o optim.amp=float16 -o data.batch_size=64" in training


def test_benchmark_that_fails(project):
    project.record("exit 1")
    assert project.run("benchmark_train.sh", project.config(), "benchmark_train").returncode == 1
    done = project.run("benchmark_train.sh", project.config(), "benchmark_train", "dynamic_bs8_fp32_DP_N1C8")
    assert done.returncode == 1 and "is for the CPU" in done.stdout
    done = project.run("benchmark_train.sh", project.config(), "benchmark_train", "bs8")
    assert done.returncode == 1 and "expected PARAMS such as" in done.stdout


def compare(expected, *files):
    return subprocess.run([sys.executable, "test_tipc/compare_results.py", "--expected", str(expected), *map(str, files)],
                          cwd=ROOT, text=True, capture_output=True, timeout=60)


def test_compare_results(tmp_path):
    rows, paths = np.linspace(0, 20, 6, dtype=np.float32).reshape(2, 3), np.array(["a/0.png", "a/1.png"])

    def write(name, rows, paths=paths):
        np.savez(tmp_path / name, pooled=rows, paths=paths)
        return tmp_path / name

    expected = write("expected.npz", rows)
    other_order = write("order.npz", rows[::-1] * 1.0005, np.array(["b/1.png", "b/0.png"]))
    done = compare(expected, other_order)
    assert done.returncode == 0 and "agrees; largest difference 1.0e-02 in 2 pictures" in done.stdout
    off = write("off.npz", rows + np.array([[0, 0, 0], [0, 0.1, 0]], np.float32))
    done = compare(expected, other_order, off)
    assert done.returncode == 1 and "off.npz: differs (most beyond the tolerance in 1.png)" in done.stdout
    assert "1 of 2 files differ" in done.stderr
    assert compare(expected, write("nan.npz", rows * np.array([[1], [np.nan]], np.float32))).returncode == 1
    for wrong, says in ((write("few.npz", rows[:1], paths[:1]), "has no picture 1.png"),
                        (write("narrow.npz", rows[:, :2]), "has 2 channels, expected 3"),
                        (write("twice.npz", rows[[0, 0, 1]], np.array(["a/0.png", "b/0.png", "a/1.png"])), "more than one picture 0.png"),
                        (write("objects.npz", rows, np.array([{}, {}])), "no pooled features can be read"),
                        (tmp_path / "none.npz", "no pooled features can be read")):
        done = compare(expected, wrong)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
