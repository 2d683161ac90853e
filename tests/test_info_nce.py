import numpy as np
import paddle
import pytest

from ppdensecl.losses import info_nce, info_nce_plain


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
@pytest.mark.parametrize("m, k", [(1, 1), (7, 5), (33, 4096), (5, 4097), (12, 10000)])
def test_one_pass_equals_the_textbook_form(m, k, temperature):
    (loss, grad), (expected, expected_grad) = _both(m, k, temperature)
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


def test_watched_numbers():
    rng = np.random.default_rng(2)
    q, n = _unit(rng, 50, 8), _unit(rng, 5000, 8)
    p = _unit(rng, 50, 8) * 0.5 + q
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    loss, watched = info_nce(*map(paddle.to_tensor, (q, p, n)), 0.2, watch=True)
    pos, neg = (q * p).sum(1), q @ n.T
    assert abs(float(watched["accuracy"]) - (pos > neg.max(1)).mean()) < 1e-12
    assert 0 < float(watched["accuracy"]) < 1
    assert abs(float(watched["positive"]) - pos.mean()) < 1e-12 and abs(float(watched["negative"]) - neg.mean()) < 1e-12
    assert float(loss) == float(info_nce(*map(paddle.to_tensor, (q, p, n)), 0.2)[0])  # watching changes nothing


def test_a_collapsed_model_has_accuracy_0():
    same = paddle.ones([4, 4]) / 2
    assert float(info_nce(same, same, same, 0.2, watch=True)[1]["accuracy"]) == 0


def test_only_the_query_gets_a_gradient_and_short_floats_are_summed_in_float32():
    rng = np.random.default_rng(3)
    q, p, n = (paddle.to_tensor(_unit(rng, *s).astype("float32")) for s in ((4, 8), (4, 8), (100, 8)))
    for t in (q, p, n):
        t.stop_gradient = False
    loss, _ = info_nce(q.astype("bfloat16"), p.astype("bfloat16"), n.astype("bfloat16"), 0.2)
    loss.backward()
    assert loss.dtype == paddle.float32 and p.grad is None and n.grad is None and q.grad is not None
    expected = float(info_nce(q.detach(), p.detach(), n.detach(), 0.2)[0])
    assert abs(float(loss) - expected) < 0.02
