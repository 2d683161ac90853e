"""What the probes of tools/eval.py compute, against counts by hand and scikit-learn's. (`test_probes.py`: runs of the tool.)"""

import numpy as np
import pytest

from ppdensecl.evaluation import dense, features, knn, linear, semi, svm, tasks


def test_average_precision_by_hand_and_by_sklearn():
    truth, scores = np.array([True, False, True]), np.array([3.0, 2, 1])
    assert svm.average_precision(truth, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert svm.average_precision(truth, scores, 11) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # recalls 0 to 0.5, 0.6 to 1
    # The precision at a recall of 1/2 is 1/2, but of 1 it is 2/3: monotone is 2/3 for both.
    assert svm.average_precision(np.array([False, True, True]), scores) == pytest.approx(2 / 3)
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for levels in (1000, 5):  # nearly no equal scores; many
        for _ in range(20):
            truth, scores = rng.random(50) < 0.3, rng.integers(0, levels, 50).astype(float)
            precision, recall, _ = metrics.precision_recall_curve(truth, scores)  # recall falls; the last point is (1, 0)
            at = [max(precision[:-1][recall[:-1] >= r - 1e-9]) for r in np.arange(11) / 10]
            assert svm.average_precision(truth, scores, 11) == pytest.approx(np.mean(at))
            area = sum(max(precision[: i + 1]) * (recall[i] - recall[i + 1]) for i in range(len(recall) - 1))
            assert svm.average_precision(truth, scores) == pytest.approx(area)
            assert area >= metrics.average_precision_score(truth, scores) - 1e-9  # which is not made monotone


def test_mean_iou_by_hand():
    truth, found = np.array([[0, 0, 0], [1, 1, 255]], np.uint8), np.array([[0, 0, 1], [1, 3, 0]])
    matrix = dense.confusion(truth, found, 4)
    assert matrix.sum() == 5 and matrix[0].tolist() == [2, 1, 0, 0] and matrix[1].tolist() == [0, 1, 0, 1]
    mean, each = dense.mean_iou(matrix)  # 2/3, 1/3, never seen, 0/1
    assert each[[0, 1, 3]].tolist() == [2 / 3, 1 / 3, 0] and np.isnan(each[2]) and mean == pytest.approx(1 / 3)


def test_low_shot_draws():
    target = np.array([1] * 10 + [0] * 5 + [-1] * 100, np.int8)
    rows = svm.sample(target, 4, 0, 0, 0)
    assert (target[rows] == 1).sum() == 4 and (target[rows] == -1).sum() == 76 and len(set(rows)) == 80
    assert rows.tolist() == svm.sample(target, 4, 0, 0, 0).tolist() != svm.sample(target, 4, 0, 1, 0).tolist()
    assert (target[svm.sample(target, 96, 0, 0, 0)] == 0).sum() == 0


def test_neighbours_in_blocks_are_those_of_all_at_once():
    rng = np.random.default_rng(0)
    for sizes in ((66_000, 3), (50, 1030)):  # two blocks of the bank, of the queries
        bank, queries = (rng.standard_normal((size, 3)) for size in sizes)
        bank[-1] = queries[-1]  # somebody's nearest is in the last block
        similarity, index = knn.neighbours(bank, queries, 7)
        all_at_once = knn.unit(queries) @ knn.unit(bank).T
        assert (index == np.argsort(-all_at_once, 1)[:, :7]).all()
        assert np.allclose(similarity, -np.sort(-all_at_once, 1)[:, :7])


def test_the_rate_falls_where_the_recipe_says():
    assert [linear.rate(30, epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert tasks.OPTIONS["lr"]["linear"] == [30.0] and tasks.OPTIONS["epochs"]["linear"] == 100
    assert tasks.OPTIONS["batch_size"]["linear"] == 256 and svm.SHOTS == (1, 2, 4, 8, 16, 32, 64, 96)


def test_the_linear_head_is_trained_without_decay_by_momentum():
    """Two steps by hand: v ← 0.9 v + g, w ← w − lr v."""
    x, y = np.array([[1.0, 2]], np.float32), np.array([1])
    head, = linear.fit(lambda epoch: [(x, y), (x, y)], 2, 2, [0.1], 1, seed=0)
    start, = linear.fit(lambda epoch: [], 2, 2, [0.1], 1, seed=0)
    w, b = start.weight.numpy().astype(float), start.bias.numpy().astype(float)
    vw, vb = 0, 0
    for _ in range(2):
        p = np.exp(x @ w + b)
        g = p / p.sum() - np.eye(2)[y]
        vw, vb = 0.9 * vw + x.T @ g, 0.9 * vb + g[0]
        w, b = w - 0.1 * vw, b - 0.1 * vb
    assert np.allclose(head.weight.numpy(), w, atol=1e-6) and np.allclose(head.bias.numpy(), b, atol=1e-6)


def test_the_test_view_is_the_middle():
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (200, 400, 3)).astype(np.uint8)
    view = features.centre(ramp, (64, 64))
    assert view.shape == (64, 64, 3) and abs(int(view[:, 0].mean()) + int(view[:, -1].mean()) - 255) <= 2
    # 7/8 of the short side: 175 of the 400 columns.
    assert view[0, -1, 0].astype(int) - view[0, 0, 0] == pytest.approx(255 * 175 / 400, abs=4)
    assert features.centre(ramp[:40, :30], (64, 48)).shape == (64, 48, 3)


def test_the_split_takes_as_many_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    chosen = semi.split(labels, 0.1, 0)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 3] and len(set(chosen)) == 13
    assert chosen.tolist() == semi.split(labels, 0.1, 0).tolist() != semi.split(labels, 0.1, 1).tolist()
