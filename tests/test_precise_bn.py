"""Precise BN: the averages it should be, what must stay as it was, and both fine-tuning tools with it.

The slow one, by the detection tool: 16 s (2 cores)."""

import os
import re
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle import nn

from conftest import ROOT
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import precise_bn

BATCHES, PER_RANK = 7, 3


def net(seed=0):
    """Norms of all kinds: trained, called twice, frozen, in a branch that is never taken; and dropout before a norm."""
    class Net(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2D(3, 4, 3)
            self.first = nn.BatchNorm2D(4)
            self.frozen = nn.BatchNorm2D(4, use_global_stats=True)
            self.dropout = nn.Dropout(0.5)
            self.shared = nn.BatchNorm2D(4, momentum=0.7)
            self.linear = nn.Linear(4, 5)
            self.last = nn.BatchNorm1D(5)
            self.never = nn.BatchNorm1D(5)

        def forward(self, x):
            x = self.frozen(nn.functional.relu(self.first(self.conv(x))))
            x = self.shared(self.dropout(x))
            x = self.shared(x * 2 + 1)
            x = self.last(self.linear(x.mean([2, 3])))
            return x if self.training else self.never(x)

    paddle.seed(seed)
    model = Net()
    rng = np.random.default_rng(seed)
    for name, value in model.state_dict().items():  # stale
        if name.endswith(("_mean", "_variance")):
            value.set_value(rng.uniform(0.5, 3, value.shape).astype("float32"))
    return model


def batches(count=BATCHES, seed=1):
    """Of different sizes, and of different distributions."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((4 + n, 3, 6, 7)) * (n + 1) + n).astype("float32") for n in range(count)]


def state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def expected(model, data):
    """{norm: (mean, variance)} in float64 by numpy alone."""
    w = {name: value.astype("float64") for name, value in state(model).items()}
    found = {name: [] for name in ("first", "shared", "last")}

    def norm(name, x, frozen=False):
        axes = (0, 2, 3)[:x.ndim - 1]
        mean, variance = (w[f"{name}._mean"], w[f"{name}._variance"]) if frozen else (x.mean(axes), x.var(axes))
        if not frozen:
            found[name].append((mean, variance))
        mean, variance, a, b = (v.reshape([1, -1] + [1] * (x.ndim - 2)) for v in (mean, variance, w[f"{name}.weight"],
                                                                                  w[f"{name}.bias"]))
        return (x - mean) / np.sqrt(variance + 1e-5) * a + b

    for x in data:
        windows = np.lib.stride_tricks.sliding_window_view(x.astype("float64"), (3, 3), (2, 3))
        x = np.einsum("nchwij,ocij->nohw", windows, w["conv.weight"]) + w["conv.bias"][None, :, None, None]
        x = norm("frozen", np.maximum(norm("first", x), 0), frozen=True)
        x = norm("shared", norm("shared", x) * 2 + 1)
        norm("last", x.mean((2, 3)) @ w["linear.weight"] + w["linear.bias"])
    return {name: np.mean(pairs, 0) for name, pairs in found.items()}


def test_statistics_are_the_plain_averages_and_nothing_else_changes():
    model, data = net(), batches()
    model.frozen.eval()  # modes come back as they were, too
    before, wanted = state(model), expected(model, data)
    assert precise_bn.estimate(model, map(paddle.to_tensor, data)) == (3, 5)
    after = state(model)
    for name, (mean, variance) in wanted.items():
        assert np.allclose(after[f"{name}._mean"], mean, rtol=1e-4, atol=1e-4), name
        assert np.allclose(after[f"{name}._variance"], variance, rtol=1e-4), name
    changed = {name for name in after if (before[name] != after[name]).any()}
    assert changed == {f"{name}.{leaf}" for name in wanted for leaf in ("_mean", "_variance")}
    assert model.training and model.shared.training and model.dropout.training and not model.frozen.training
    assert model.first._momentum == 0.9 and model.shared._momentum == 0.7
    assert not any(layer._forward_post_hooks for layer in model.sublayers())
    assert all(value.grad is None for value in model.parameters())
    x = paddle.to_tensor(data[0])
    model.eval()
    scores, old = model(x).numpy(), net()
    old.eval()
    assert np.abs(scores - old(x).numpy()).max() > 0.1  # what was stale scores differently


def test_after_an_error_all_is_as_it_was():
    model = net()
    model.eval()
    before = state(model)
    data = batches(2)
    for wrong, error in ((np.full_like(data[0], np.nan), UserError), (np.zeros((2, 5, 6, 7), "float32"), ValueError)):
        with pytest.raises(error):
            precise_bn.estimate(model, map(paddle.to_tensor, [data[0], wrong]))
        assert all((before[name] == array).all() for name, array in state(model).items())
        assert not model.training and model.first._momentum == 0.9
        assert not any(layer._forward_post_hooks for layer in model.sublayers())


def test_a_loader_begins_again():
    assert list(precise_bn.repeated([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]
    assert precise_bn.estimate(nn.Linear(2, 2), []) == (0, 0)


def test_two_ranks_have_the_averages_of_both(tmp_path):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log"),
               str(ROOT / "tests/test_precise_bn.py"), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr
    ranks = [checkpoint.read_arrays(tmp_path / f"{rank}.pdparams") for rank in (0, 1)]
    wanted = expected(net(), batches(2 * PER_RANK))
    for name, (mean, variance) in wanted.items():
        for arrays in ranks:
            assert np.allclose(arrays[f"{name}._mean"], mean, rtol=1e-4, atol=1e-4), name
            assert np.allclose(arrays[f"{name}._variance"], variance, rtol=1e-4), name
    assert all((ranks[0][name] == ranks[1][name]).all() for name in ranks[0])


def changed(first, second):
    """The names of two files of weights, which are the same, whose numbers differ; all must be running statistics."""
    first, second = checkpoint.read_arrays(first), checkpoint.read_arrays(second)
    assert first.keys() == second.keys()
    names = {name for name in first if first[name].tobytes() != second[name].tobytes()}
    assert all(name.endswith(("._mean", "._variance")) for name in names)
    return names


def test_by_the_segmentation_tool(tmp_path, run_tool):
    pytest.importorskip("paddleseg", reason="PaddleSeg is not installed")
    from ppdensecl.interop import paddleseg as seg
    from test_finetune_seg import CAMVID, NARROW, camvid, crop

    config = seg.read_config(ROOT / CAMVID, camvid(tmp_path / "data"), opts=NARROW)
    crop(config, 64)
    (tmp_path / "small.yml").write_text(str(config))
    model = seg.SegBuilder(config).model
    for layer in model.sublayers():
        if isinstance(layer, nn.BatchNorm2D):
            layer._variance.set_value(layer._variance * 50)  # stale: the maps almost vanish
    source, out = tmp_path / "model.pdparams", tmp_path / "precise" / "model.pdparams"
    checkpoint.write_arrays(source, state(model))
    common = ["finetune_seg.py", "-c", tmp_path / "small.yml"]
    options = ["--model_path", source, "--num_workers", 0, "--batch_size", 2, "--seed", 0]
    result = run_tool(*common, "precise_bn", *options, "--save_dir", out.parent, "--batches", 4)  # of three in an epoch
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"written: {out}; statistics of 24 of 24 BatchNorms estimated from 4 batches" in result.stdout
    assert len(changed(source, out)) == 48
    scores = [run_tool(*common, "eval", "--model_path", path, "--num_workers", 0).stdout.splitlines()[-1].partition(": ")[2]
              for path in (source, out)]
    assert all("mIoU" in score for score in scores) and scores[0] != scores[1], scores
    result = run_tool(*common, "precise_bn", *options, "--save_dir", tmp_path)
    assert result.returncode == 1 and "is the file that is read" in result.stderr and len(changed(source, source)) == 0


@pytest.mark.slow
def test_by_the_detection_tool(tmp_path, run_tool):
    pytest.importorskip("ppdet", reason="PaddleDetection is not installed")
    from test_finetune_det import BCCD, SMALL, schedule, scenes

    options = ["-o", *scenes(tmp_path), *SMALL, f"save_dir={tmp_path}", schedule(3)]
    common = ["finetune_det.py", "-c", BCCD]
    result = run_tool(*common, "train", *options, "iterations=1", "validate=false")
    assert result.returncode == 0, result.stdout + result.stderr
    source, out = tmp_path / "faster_rcnn_r18_bccd/model_final.pdparams", tmp_path / "precise.pdparams"
    result = run_tool(*common, "precise_bn", "--out", out, *options, f"weights={source}", "precise_bn=3")
    assert result.returncode == 0 and f"written: {out}" in result.stdout, result.stdout + result.stderr
    found = re.search(r"statistics of (\d+) of \1 BatchNorms estimated from 3 batches", result.stdout + result.stderr)
    assert len(changed(source, out)) == 2 * int(found.group(1))
    result = run_tool(*common, "eval", *options, f"weights={out}")
    assert result.returncode == 0 and "bbox: AP " in result.stdout, result.stdout + result.stderr
    for wrong, words in (("precise_bn=0", "'precise_bn' is 0, expected"), (f"weights={out}", "is the file that is read")):
        result = run_tool(*common, "precise_bn", "--out", out, *options, f"weights={source}", wrong)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr


if __name__ == "__main__":  # one of two ranks
    from ppdensecl import parallel

    parallel.start()
    mine = batches(2 * PER_RANK)[parallel.rank()::2]
    model = net()
    precise_bn.estimate(model, map(paddle.to_tensor, mine))
    checkpoint.write_arrays(f"{sys.argv[1]}/{parallel.rank()}.pdparams", state(model))
