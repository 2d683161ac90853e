"""Runs as a user starts them: tools/train.py as a process of its own."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppdensecl import machine
from ppdensecl.config import load_config
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.transforms import Augmentation
from ppdensecl.engine import checkpoint
from ppdensecl.engine.building import build_model
from ppdensecl.engine.trainer import Trainer
from ppdensecl.models import DenseCL

ROOT = Path(__file__).resolve().parent.parent
TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=20", "data.image_size=32", "data.batch_size=4",
        "data.workers=0", "model.queue_len=30", "model.hidden_dim=16", "model.embedding_dim=8", "log.interval=1",
        "log.visualdl=false", "optim.epochs=2", "save.interval_iters=3", "save.keep_last=null"]


def _train(run_tool, folder, *arguments, overrides=(), **options):
    return run_tool("train.py", *TINY, f"output_dir={folder}", *overrides, *arguments, **options)


def _same(a, b):
    a, b = checkpoint.load_weights(a), checkpoint.load_weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] == b[name]).all(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    result = subprocess.run([sys.executable, "tools/train.py", *TINY, f"output_dir={folder}"], cwd=ROOT, text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_leaves_what_it_promises(undisturbed, run_tool, tmp_path):
    folder, result = undisturbed
    names = {f"{name}.{kind}" for name in ("latest", "iter_3", "epoch_1", "iter_6", "iter_9", "epoch_2")
             for kind in ("pdparams", "pdopt", "pdstates")}
    assert {path.name for path in folder.iterdir()} == names | {"train.log", "config.yaml", ".lock"}
    assert load_config(folder / "config.yaml").data.synthetic_count == 20
    fields = (r"epoch: 2/2, iter: 5/5, lr: [\d.]+, loss: [\d.]+, loss_global: [\d.]+, loss_dense: [\d.]+, lambda: 0.5000, "
              r"accuracy: .*positive: .*negative: .*dense_accuracy: .*dense_positive: .*dense_negative: .*matched_share: .*"
              r"avg_reader_cost: [\d.]+ sec, avg_batch_cost: [\d.]+ sec, avg_samples: 4.0, avg_ips: [\d.]+ images/sec, "
              r"eta: 0:00:00")
    assert re.search(fields, result.stdout) and re.search(fields, (folder / "train.log").read_text())
    states = json.loads((folder / "latest.pdstates").read_text())
    assert (states["iteration"], states["epoch"], states["config"]["seed"]) == (10, 2, 0)

    out = tmp_path / "backbone.pdparams"
    extracted = run_tool("extract_backbone.py", folder / "latest", out)
    assert extracted.returncode == 0, extracted.stderr
    net = build_model(load_config(folder / "config.yaml")).encoder_q.backbone
    loaded = paddle.load(str(out))
    assert loaded.keys() == net.state_dict().keys()
    weights = checkpoint.load_weights(folder / "epoch_2.pdparams")
    assert (loaded["layer1.0.conv1.weight"].numpy() == weights["encoder_q.backbone.layer1.0.conv1.weight"]).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [5, 6])  # the end of an epoch, and the middle of one
def test_a_resumed_run_is_bit_identical(undisturbed, run_tool, tmp_path, workers, stop):
    overrides = [f"data.workers={workers}"]
    assert _train(run_tool, tmp_path, overrides=[*overrides, f"optim.max_iters={stop}"]).returncode == 0
    resumed = _train(run_tool, tmp_path, "--resume", overrides=overrides)
    assert resumed.returncode == 0 and f"at iteration {stop}" in resumed.stdout, resumed.stderr
    _same(tmp_path / "latest", undisturbed[0] / "latest")
    a, b = (checkpoint.load_optimizer(folder / "latest") for folder in (tmp_path, undisturbed[0]))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert "encoder_q.backbone.conv1.weight/velocity_0" in a


def test_resume_from_a_path_and_from_the_one_before_a_damaged_one(undisturbed, run_tool, tmp_path):
    folder = undisturbed[0]
    assert _train(run_tool, tmp_path, "--resume", folder / "iter_6").returncode == 0
    _same(tmp_path / "latest", folder / "latest")
    for path in tmp_path.glob("*_*.pdparams"):
        if path.stem not in ("iter_9",):
            path.write_bytes(path.read_bytes()[:-100])
    resumed = _train(run_tool, tmp_path, "--resume")
    assert resumed.returncode == 0 and "damaged" in resumed.stdout and "iter_9 at iteration 9" in resumed.stdout
    _same(tmp_path / "latest", folder / "latest")


def test_a_killed_run_goes_on_to_the_same_weights(undisturbed, run_tool, tmp_path):
    process = subprocess.Popen([sys.executable, "tools/train.py", *TINY, f"output_dir={tmp_path}"], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "iter: 4/" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not (tmp_path / "epoch_2.pdparams").exists()
    assert _train(run_tool, tmp_path, "--resume").returncode == 0
    _same(tmp_path / "latest", undisturbed[0] / "latest")


def test_the_loop_is_the_one_written_out_here(tmp_path):
    """Two iterations of two batches: learning rate, λ warm-up, one EMA update and one enqueue each, mean gradient."""
    config = load_config(ROOT / "configs/densecl_r18_demo.yaml", [*TINY[3:], f"output_dir={tmp_path}", "optim.accumulate=2",
                         "optim.epochs=1", "model.lambda_warmup_iters=1", "optim.lr=0.05", "model.matching=random"])
    trainer = Trainer(config)
    source = trainer.loader.source
    trainer.fit()

    model = build_model(config)
    optimizer = paddle.optimizer.Momentum(1.0, 0.9, [p for p in model.parameters() if not p.stop_gradient],
                                          weight_decay=1e-4)
    views = PairLoader(source, Augmentation(size=config.data.size), 4, config.seed).batches(range(4))
    model.train()
    for step, lr in enumerate((0.05, 0.025)):  # a cosine over two iterations
        optimizer.set_lr(lr)
        model.update_key_encoder()
        outputs = []
        for _ in range(2):
            q, k = (paddle.to_tensor(view) for view in next(views))
            out = model(q, k, step=step)
            assert out.loss_lambda == (0.0 if step == 0 else 0.5)
            (out.loss / 2).backward()
            outputs.append(out)
        optimizer.step()
        optimizer.clear_grad()
        for out in outputs:
            model.enqueue(out)
    found = checkpoint.load_weights(tmp_path / "latest")
    for name, value in model.state_dict().items():
        assert (found[name] == value.numpy()).all(), name


def test_accumulation_has_the_large_batchs_gradient():
    """Both halves of a batch against the same queue and key encoder: with BatchNorm frozen, the gradients are equal."""
    rng = np.random.default_rng(0)
    pair = [paddle.to_tensor(rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    grads = []
    for parts in (1, 2):
        paddle.seed(0)
        model = DenseCL("resnet18", 16, 8, queue_len=30)
        model.eval()
        for i in range(parts):
            rows = slice(i * 4 // parts, (i + 1) * 4 // parts)
            (model(pair[0][rows], pair[1][rows]).loss / parts).backward()
        grads.append(model.encoder_q.backbone.layer4[1].conv2.weight.grad.numpy())
    assert np.abs(grads[0] - grads[1]).max() < 1e-4 * np.abs(grads[0]).max()


def test_an_accumulated_run_counts_iterations_and_fills_the_queue(run_tool, tmp_path):
    result = _train(run_tool, tmp_path, overrides=["optim.accumulate=2"])
    assert result.returncode == 0 and "2 iterations an epoch, 4 in all, 8 pictures in each" in result.stdout
    assert int(checkpoint.load_weights(tmp_path / "latest")["queue.pointer"]) == 4 * 8 % 30


def test_visualdl_gets_scalars_and_view_pairs(run_tool, tmp_path):
    assert _train(run_tool, tmp_path, overrides=["log.visualdl=true", "optim.max_iters=2"]).returncode == 0
    from visualdl import LogReader

    (log,) = (tmp_path / "vdl").iterdir()
    tags = LogReader(file_path=str(log)).get_tags()
    scalars = " ".join(tags["scalar"])
    for name in ("loss", "loss_global", "loss_dense", "lambda", "lr", "accuracy", "dense_accuracy", "matched_share", "reader"):
        assert name in scalars
    assert tags["image"]


def test_the_correspondence_is_watched_and_changes_nothing(undisturbed, run_tool, tmp_path):
    watched = ["log.correspondence_interval=5", "log.correspondence_pictures=6", "log.visualdl=true", "log.interval=3", "optim.recompute=2"]
    result = _train(run_tool, tmp_path, overrides=watched)
    assert result.returncode == 0, result.stderr
    _same(tmp_path / "latest", undisturbed[0] / "latest")
    lines = re.findall(r"correspondence at iteration (\d+)/10: ([\d.]+), chance ([\d.]+), own position .*wrong ([\d.]+)", (tmp_path / "train.log").read_text())
    assert [line[0] for line in lines] == ["0", "5", "10"]

    from visualdl import LogReader

    (log,) = (tmp_path / "vdl").iterdir()
    curve = LogReader(file_path=str(log)).get_data("scalar", "eval/correspondence")
    assert [(point.id, f"{point.value:.4f}") for point in curve] == [(int(line[0]), line[1]) for line in lines]
    scored = run_tool("eval.py", "-c", tmp_path / "config.yaml", "--checkpoint", tmp_path / "latest", "--task", "correspondence",
                      "--count", 6, "--no-random", "--out", tmp_path / "c.json")
    assert scored.returncode == 0, scored.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    elsewhere = found["details"]["trained"]["shown"]["cells whose own position is wrong"]
    assert tuple(f"{share:.4f}" for share in (found["trained"], found["chance"], elsewhere)) == lines[2][1:]


def test_print_config_shows_the_merged_result_and_trains_nothing(run_tool, tmp_path):
    result = run_tool("train.py", "-c", "configs/moco_v2_r50_coco_800ep.yaml", "-o", "optim.lr=0.1", "--override", "seed=5",
                      "--print-config")
    assert result.returncode == 0
    (tmp_path / "x.yaml").write_text(result.stdout)
    config = load_config(tmp_path / "x.yaml")
    assert (config.optim.lr, config.seed, config.optim.epochs, config.model.loss_lambda) == (0.1, 5, 800, 0)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(run_tool, tmp_path):
    result = _train(run_tool, tmp_path, overrides=["optim.lr=1e30", "optim.warmup_epochs=0", "save.interval_iters=1"])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"loss is not finite at iteration \d.*optim.lr", result.stderr)
    if checkpoint.exists(tmp_path):
        assert all(np.isfinite(value).all() for value in checkpoint.load_weights(tmp_path / "latest").values())


PHOTOS = ["-c", "configs/densecl_r18_photos.yaml", "-o"]


@pytest.mark.parametrize("arguments, words", [
    (["-c", "configs/none.yaml"], "configs/none.yaml: cannot read the config"),
    ([*TINY, "optim.lr=fast"], "'optim.lr' is 'fast', expected a number"),
    ([*TINY, "optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
    ([*TINY, "device=gpu"], "'device' is 'gpu', but"),
    ([*TINY, "optim.amp=float16", "device=cpu"], "'optim.amp' is 'float16', but"),
    ([*TINY, "model.sync_bn=true", "device=cpu"], "SyncBatchNorm has no CPU kernel"),
    ([*TINY, "data.batch_size=21"], "'data.batch_size' asks for 21"),
    ([*TINY, "optim.accumulate=6"], "'optim.accumulate' is 6"),
    ([*TINY, "output_dir=/proc/x"], "'output_dir' /proc/x cannot be written"),
    ([*PHOTOS, "seed=0"], "data.root"),
    ([*PHOTOS, "data.root=/none"], "/none"),
    ([*PHOTOS, "data.root=configs"], "configs"),
    ([*PHOTOS, "data.source=list", "data.list_file=/none.txt"], "/none.txt"),
    ([*PHOTOS, "data.source=archive", "data.root=README.md"], "README.md"),
    ([*PHOTOS, "data.source=lmdb", "data.root=configs"], "configs"),
    ([*PHOTOS, "data.source=coco", "data.root=configs", "data.annotation=/none.json"], "/none.json"),
    ([*TINY, "--resume", "/none/latest"], "/none/latest.pdstates: no such file"),
])
def test_bad_input_is_one_sentence_and_status_1(run_tool, tmp_path, arguments, words):
    if "output_dir=/proc/x" not in arguments and "-o" in arguments:
        place = arguments.index("-o") + 1
        arguments = [*arguments[:place], f"output_dir={tmp_path / 'out'}", *arguments[place:]]
    result = run_tool("train.py", *arguments)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and words in last, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out" / "latest.pdparams").exists()


@pytest.mark.parametrize("arguments", [[], ["-c"], [*TINY, "--nonsense"]])
def test_wrong_usage_is_status_2(run_tool, arguments):
    assert run_tool("train.py", *arguments).returncode == 2


def test_a_refused_command_changes_nothing(undisturbed, run_tool, tmp_path):
    assert _train(run_tool, tmp_path, overrides=["optim.max_iters=1"]).returncode == 0
    (tmp_path / "backbone.pdparams").write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.name != "train.log"}
    for arguments in (["--overwrite", "-o", "data.source=folder", "data.root=/typo"], ["--resume", "-o", "model.momentum=0.5"]):
        assert _train(run_tool, tmp_path, *arguments).returncode == 1
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.name != "train.log"} == before
    assert _train(run_tool, tmp_path, "--overwrite", overrides=["optim.max_iters=2"]).returncode == 0
    assert (tmp_path / "backbone.pdparams").exists() and not (tmp_path / "iter_1.pdparams").exists()
    log = (tmp_path / "train.log").read_text()
    assert log.count("iter: 1/") == 1 and "INFO: ppdensecl " in log.splitlines()[0]


def test_resume_goes_on_where_the_run_was_last_not_where_it_was_farthest(undisturbed, run_tool, tmp_path):
    assert _train(run_tool, tmp_path).returncode == 0
    assert _train(run_tool, tmp_path, "--resume", tmp_path / "iter_3", overrides=["optim.max_iters=4"]).returncode == 0
    resumed = _train(run_tool, tmp_path, "--resume", overrides=["optim.max_iters=5"])
    assert "at iteration 4" in resumed.stdout


def test_two_runs_do_not_share_a_folder(run_tool, tmp_path):
    first = subprocess.Popen([sys.executable, "tools/train.py", *TINY, f"output_dir={tmp_path}", "optim.epochs=200"], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)
    next(line for line in first.stdout if "iter: 1/" in line)
    second = _train(run_tool, tmp_path, "--resume")
    first.kill()
    first.wait()
    assert second.returncode == 1 and "another run is writing" in second.stderr


def test_two_processes_train(tmp_path):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log"),
               "tools/train.py", *TINY, f"output_dir={tmp_path}", "optim.epochs=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 process(es)" in result.stdout and "2 iterations an epoch, 2 in all, 8 pictures in each" in result.stdout
    assert int(checkpoint.load_weights(tmp_path / "latest")["queue.pointer"]) == 16


def test_a_folder_with_a_run_is_not_written_over_unless_asked(undisturbed, run_tool, tmp_path):
    assert _train(run_tool, tmp_path, overrides=["optim.max_iters=2"]).returncode == 0
    refused = _train(run_tool, tmp_path, overrides=["optim.max_iters=1"])
    assert refused.returncode == 1 and "--resume" in refused.stderr and "--overwrite" in refused.stderr
    other = _train(run_tool, tmp_path, "--resume", overrides=["model.momentum=0.5"])
    assert other.returncode == 1 and "model.momentum: 0.99, now 0.5" in other.stderr
    assert _train(run_tool, tmp_path, "--overwrite", overrides=["optim.max_iters=1"]).returncode == 0
    assert sorted(path.stem for path in tmp_path.glob("*.pdparams")) == ["iter_1", "latest"]


def test_training_on_a_users_folder_names_its_broken_pictures(run_tool, tmp_path):
    import cv2

    for i in range(12):
        picture = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
    (tmp_path / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    common = ["-c", "configs/densecl_r18_photos.yaml", "-o", *TINY[3:], "data.source=folder", f"data.root={tmp_path}",
              "data.workers=1", f"output_dir={tmp_path / 'out'}"]
    result = run_tool("train.py", *common, "data.max_bad_fraction=0.2")
    assert result.returncode == 0 and "7.png" in result.stdout and "another picture stands in" in result.stdout, result.stderr
    result = run_tool("train.py", *common, "--overwrite")
    assert result.returncode == 1 and "1 of 12 pictures cannot be decoded" in result.stderr and "7.png" in result.stderr


@pytest.mark.parametrize("arguments, overrides, expected", [
    ([], [], (2, 16)), ([], ["data.batch_size=48"], (3, 16)), ([], ["data.batch_size=16"], None),
    ([], ["model.bn_groups=2"], None), ([], ["device=gpu"], None), (["--processes", "1"], [], None),
    (["--processes", "4"], ["data.batch_size=8"], (4, 2))])
def test_on_a_cpu_the_cores_share_a_batch(monkeypatch, tmp_path, arguments, overrides, expected):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tools")
    train = importlib.import_module("train")
    for name in ("PPDENSECL_CPU_THREADS", "PADDLE_TRAINERS_NUM", "PPDENSECL_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train.command_line, "gpu_build", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    started, config = [], load_config(ROOT / "configs/densecl_r18_demo.yaml", overrides)
    train.share(config, int(arguments[1]) if arguments else None)
    assert len(started) == (expected is not None)
    for command in started:
        assert command[command.index("--nproc_per_node") + 1] == str(expected[0])
        assert f"data.batch_size={expected[1]}" in command and "device=cpu" in command
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(["-1"] * expected[0])  # a shorter list ends Paddle's launcher
        assert os.environ["PADDLE_DISTRI_BACKEND"] == "gloo"


def test_the_processes_of_a_shared_batch_end_with_their_launcher(tmp_path):
    """Killed without a word, it leaves no process behind that would hold the run's folder."""
    out = tmp_path / "out"
    command = [sys.executable, "tools/train.py", *TINY, "optim.epochs=1000", f"output_dir={tmp_path / 'run'}", "--processes", "2"]
    with open(out, "w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    _until(lambda: (tmp_path / "run/latest.pdparams").exists(), launcher, out)
    launcher.kill()
    launcher.wait()
    log = tmp_path / "run/log/workerlog.0"
    _until(lambda: "stopped by SIGTERM" in log.read_text(), None, log)
    resumed = subprocess.run([*command, "--resume", "-o", "optim.max_iters=1"], cwd=ROOT, capture_output=True, text=True,
                             timeout=120)
    assert resumed.returncode == 0 and "2 process(es)" in resumed.stdout, resumed.stderr


def _until(true, process, out):
    limit = time.monotonic() + 90
    while not true():
        assert time.monotonic() < limit and (process is None or process.poll() is None), out.read_text()
        time.sleep(0.2)


def test_a_step_between_two_log_lines_never_waits_for_the_device(tmp_path, monkeypatch):
    """Nothing is read back: a number that the host wants to see makes it wait until all that was asked for is computed."""
    trainer = Trainer(load_config(ROOT / TINY[1], [*TINY[3:], f"output_dir={tmp_path}", "log.interval=1000", "optim.epochs=2",
                                                   "model.bn_groups=2", "optim.accumulate=2", "save.interval_iters=null"]))
    reads, steps = [], []
    for name in ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__array__"):
        def read(tensor, *arguments, plain=getattr(paddle.Tensor, name), name=name):
            reads.append((trainer.iteration, name))
            return plain(tensor, *arguments)
        monkeypatch.setattr(paddle.Tensor, name, read)
    monkeypatch.setattr(Trainer, "_log", lambda self, *_: steps.append(self.iteration))
    monkeypatch.setattr(Trainer, "_save_if_due", lambda self, losses: False)
    trainer.fit()
    assert trainer.iteration == 4 and not reads, reads
