import importlib
import json
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT

from ppdensecl.losses import info_nce, info_nce_plain

module = importlib.import_module("ppdensecl.losses.info_nce")  # the package has a function of this name


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows of the queue in one chunk, few enough for small tests to have several."""
    monkeypatch.setattr(module, "LOGITS", {"cpu": 1, "gpu": 1})
    monkeypatch.setattr(module, "MIN_CHUNK", 64)
    return module.MIN_CHUNK


def _unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _both(m, k, temperature, dtype="float64", d=16, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [_unit(rng, m, d), _unit(rng, m, d), _unit(rng, k, d)]
    results = []
    for function in (lambda *a: info_nce(*a)[0], info_nce_plain):
        q, p, n = (paddle.to_tensor(a.astype(dtype)) for a in arrays)
        q.stop_gradient = False
        loss = function(q, p, n, temperature)
        (loss * 3.0).backward()
        results.append((float(loss), q.grad.numpy()))
    return results


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.05, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("m, k", [(1, 1), (7, 5), (33, 64), (5, 65), (12, 1000)])
def test_one_pass_equals_the_textbook_form(small_chunks, m, k, temperature):
    (loss, grad), (expected, expected_grad) = _both(m, k, temperature)
    assert abs(loss - expected) <= 1e-11 * max(1, abs(expected))
    assert np.abs(grad - expected_grad).max() <= 1e-11 * max(1, np.abs(expected_grad).max())


@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_chunks_as_they_are(temperature):
    """3 chunks, of 668, 668 and 164."""
    assert 2 * module.LOGITS["cpu"] // 1568 < 1500
    (loss, grad), (expected, expected_grad) = _both(1568, 1500, temperature)
    assert abs(loss - expected) <= 1e-11 * max(1, abs(expected))
    assert np.abs(grad - expected_grad).max() <= 1e-11 * max(1, np.abs(expected_grad).max())


def test_float32_stays_within_its_noise():
    (loss, grad), (expected, expected_grad) = _both(64, 9000, 0.2, "float32", d=128)
    assert abs(loss - expected) < 1e-5
    assert np.abs(grad - expected_grad).max() < 1e-7


@pytest.mark.parametrize("temperature", [0.005, 0.2])
@pytest.mark.parametrize("function", [lambda *a: info_nce(*a)[0], info_nce_plain])
def test_against_numpy_with_every_logit_divided_by_the_temperature(function, temperature):
    rng = np.random.default_rng(1)
    q, p, n = _unit(rng, 3, 8), _unit(rng, 3, 8), _unit(rng, 10, 8)
    logits = np.concatenate([(q * p).sum(1, keepdims=True), q @ n.T], 1) / temperature
    expected = (np.log(np.exp(logits).sum(1)) - logits[:, 0]).mean()
    assert abs(float(function(*map(paddle.to_tensor, (q, p, n)), temperature)) - expected) < 1e-11


@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_watched_numbers(small_chunks, temperature):
    rng = np.random.default_rng(2)
    q, n = _unit(rng, 50, 8), _unit(rng, 5000, 8)
    p = _unit(rng, 50, 8) * 0.5 + q
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    loss, watched = info_nce(*map(paddle.to_tensor, (q, p, n)), temperature, watch=True)
    pos, neg = (q * p).sum(1), q @ n.T
    assert abs(float(watched["accuracy"]) - (pos > neg.max(1)).mean()) < 1e-12
    assert 0 < float(watched["accuracy"]) < 1
    assert abs(float(watched["positive"]) - pos.mean()) < 1e-12 and abs(float(watched["negative"]) - neg.mean()) < 1e-12
    assert float(loss) == float(info_nce(*map(paddle.to_tensor, (q, p, n)), temperature)[0])  # watching changes nothing


def test_a_collapsed_model_has_accuracy_0():
    same = paddle.ones([4, 4]) / 2
    assert float(info_nce(same, same, same, 0.2, watch=True)[1]["accuracy"]) == 0


def test_a_tie_with_the_hardest_negative_is_no_hit_wherever_it_stands(small_chunks):
    rng = np.random.default_rng(4)
    keys = np.concatenate([np.eye(8), -np.ones((2 * small_chunks, 8)) / 8**0.5])  # exact products
    for place in (0, small_chunks, 2 * small_chunks):
        n = paddle.to_tensor(np.roll(keys, place, axis=0))
        q = paddle.to_tensor(np.eye(8)[rng.permutation(8)])
        loss, watched = info_nce(q, q, n, 0.25, watch=True)
        assert float(watched["accuracy"]) == 0 and abs(float(loss) - float(info_nce_plain(q, q, n, 0.25))) < 1e-12
        without = paddle.to_tensor(np.roll(keys[8:], place, axis=0))
        assert float(info_nce(q, q, without, 0.25, watch=True)[1]["accuracy"]) == 1


@pytest.mark.parametrize("dtype, noise", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_only_the_query_gets_a_gradient_and_short_floats_are_summed_in_float32(small_chunks, dtype, noise):
    rng = np.random.default_rng(3)
    q, p, n = (paddle.to_tensor(_unit(rng, *s).astype("float32")).astype(dtype) for s in ((4, 8), (4, 8), (5000, 8)))
    for t in (q, p, n):
        t.stop_gradient = False
    loss, _ = info_nce(q, p, n, 0.2)
    loss.backward()
    assert loss.dtype == paddle.float32 and p.grad is None and n.grad is None and q.grad.dtype == q.dtype
    exact = q.detach().astype("float64")
    exact.stop_gradient = False
    expected = info_nce_plain(exact, *(t.detach().astype("float64") for t in (p, n)), 0.2)
    expected.backward()
    assert abs(float(loss) - float(expected)) < 1e-5  # as good as the numbers given
    assert np.abs(q.grad.astype("float64").numpy() - exact.grad.numpy()).max() < noise * np.abs(exact.grad.numpy()).max()


@pytest.mark.parametrize("watch", [False, True])
def test_upstream_gradients_scale_and_paddle_grad_works(watch):
    rng = np.random.default_rng(5)
    q, p, n = (paddle.to_tensor(_unit(rng, *s)) for s in ((4, 8), (4, 8), (100, 8)))
    q.stop_gradient = False
    weight = paddle.to_tensor(2.0, "float64")
    weight.stop_gradient = False
    (once,) = paddle.grad(info_nce(q, p, n, 0.2, watch)[0], [q])  # with Paddle 2.6 a PyLayer's unused outputs end in a crash
    loss = info_nce(q * 1, p, n, 0.2, watch)[0]
    (loss * weight - 5 * loss).backward()
    assert np.allclose(q.grad.numpy(), -3 * once.numpy(), rtol=1e-12, atol=0) and np.abs(once.numpy()).max() > 0.1
    assert abs(float(weight.grad) - float(loss)) < 1e-12


def test_second_derivatives_are_refused_and_leave_no_trace():
    rng = np.random.default_rng(6)
    q, p, n = (paddle.to_tensor(_unit(rng, *s)) for s in ((4, 8), (4, 8), (100, 8)))
    q.stop_gradient = False
    with pytest.raises((NotImplementedError, OSError), match="first derivatives only"):  # Paddle makes an OSError of it
        paddle.grad(info_nce(q, p, n, 0.2)[0], [q], create_graph=True)
    (grad,) = paddle.grad(info_nce(q, p, n, 0.2)[0], [q])
    (expected,) = paddle.grad(info_nce_plain(q, p, n, 0.2), [q])
    assert np.allclose(grad.numpy(), expected.numpy(), atol=1e-12)


MEMORY = """
import ctypes, json, sys
sys.path[:0] = ["benchmarks", "."]
import measure, paddle
from pathlib import Path
from ppdensecl.losses import info_nce
q, queue = (paddle.nn.functional.normalize(paddle.randn([n, 64])) for n in (784, 65536))
q.stop_gradient = False
extra = []
for k in (8192, 8192, 65536):  # the first warms up
    negatives = queue[:k]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = measure.memory("VmRSS")
    info_nce(q, q.detach(), negatives, 0.2)[0].backward()
    extra.append(measure.memory("VmHWM") - before)
print(json.dumps(extra[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_queue():
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    short, long = json.loads(run.stdout.splitlines()[-1])
    # 4 MiB of logits and a few [784, 64]; all logits with 65536 negatives are 196 MiB.
    assert short < 16 and long < short + 4
