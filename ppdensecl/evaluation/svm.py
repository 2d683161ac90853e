"""Linear SVMs on frozen features, for VOC2007 or one class a picture, with all labels and with k positive pictures per class.

The protocol of Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (ICCV 2019), which the
published numbers follow: features of length 1, one LIBLINEAR SVM for each class (squared hinge, positives weigh twice),
"difficult" pictures left out in training and test, the cost by threefold cross-validation on average precision. Average precision
is the area below precision over recall, precision made monotone (as VOC counts since 2010); the 11-point value of VOC2007
itself is given beside it.

Low-shot: k positives and 19 k negatives per class, drawn anew in each of 5 samples. With k = 1 there is nothing to
cross-validate on, so all costs are tried and the one with the best mean on the test pictures counts: a little optimistic.
"""

import warnings

import numpy as np

from ppdensecl.errors import UserError

COSTS = tuple(2.0**-power for power in range(19, 3, -1)) + (0.1, 1.0, 10.0, 100.0)
LOW_SHOT_COSTS = (0.01, 0.1, 1.0, 10.0, 100.0)
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)


def need_sklearn():
    """Raises UserError where scikit-learn is not installed: it is no part of the light core."""
    try:
        import sklearn.svm  # noqa: F401
    except ImportError:
        raise UserError("--task svm needs scikit-learn, which is not installed: pip install scikit-learn") from None


def average_precision(truth, scores, points=None):
    """Average precision of one class. truth bool [n], scores float [n] → float.

    points None: the area below the precision made monotone (the greatest at this recall or above), VOC's since 2010.
    points 11: the mean of that at the recalls 0, 0.1, …, 1, VOC2007's. Equal scores count as found together.
    """
    arrangement = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[arrangement])
    last = np.append(np.diff(scores[arrangement]) != 0, True)  # of a run of equal scores
    hits, found = hits[last], np.flatnonzero(last) + 1
    recall, precision = hits / hits[-1], np.maximum.accumulate((hits / found)[::-1])[::-1]
    if points is None:
        return float((np.diff(recall, prepend=0) * precision).sum())
    # A recall of 0.3 is 3 of 10 and not 0.30000000000000004: compared in whole numbers.
    firsts = [np.flatnonzero(hits * (points - 1) >= step * hits[-1]) for step in range(points)]
    return float(np.mean([precision[first[0]] for first in firsts]))


def machine(cost, seed):
    from sklearn.svm import LinearSVC

    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, dual=True, tol=1e-4, max_iter=2000,
                     random_state=seed)


def choose_cost(features, target, costs, seed):
    """The cost with the highest mean average precision over three folds; the first where there are too few pictures for two."""
    from sklearn.model_selection import cross_val_score

    folds = min(3, (target > 0).sum(), (target < 0).sum())
    if folds < 2 or len(costs) == 1:
        return costs[0]
    means = [cross_val_score(machine(cost, seed), features, target, cv=int(folds), scoring="average_precision").mean()
             for cost in costs]
    return costs[int(np.argmax(means))]


def sample(target, k, seed, draw, column):
    """Rows of k positives and 19 k negatives (fewer where there are fewer) of one class. target int8 [n] → int64 [≤ 20 k]."""
    rng = np.random.default_rng([seed, 5, draw, k, column])
    positive, negative = np.flatnonzero(target > 0), np.flatnonzero(target < 0)
    return np.sort(np.concatenate([rng.permutation(positive)[:k], rng.permutation(negative)[: 19 * k]]))


def unit(features):
    features = np.asarray(features, np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def probe(features, targets, test, truth, classes, costs=COSTS, low_costs=LOW_SHOT_COSTS, shots=SHOTS, samples=5, seed=0):
    """{"accuracy": mAP of the full data, "eleven_point", "per_class", "costs", "low_shot": {k: {mean, std, cost, samples}}}.

    features [n, C], test [m, C] float; targets [n, K], truth [m, K] int8: 1, 0 (left out), −1. Raises UserError.
    """
    for name, column, there in zip(classes, targets.T, truth.T):
        if not (column > 0).any() or not (column < 0).any() or not (there > 0).any():
            raise UserError(f"the class {name} lacks positive or negative training pictures, or positive test pictures; is the "
                            "data set whole?")
    features, test = unit(features), unit(test)
    area, eleven, chosen = [], [], []
    with warnings.catch_warnings():  # 2000 rounds do not always converge; the protocol stops there
        warnings.simplefilter("ignore")
        for column, there in zip(targets.T, truth.T):
            used, seen = column != 0, there != 0
            cost = choose_cost(features[used], column[used], costs, seed)
            scores = machine(cost, seed).fit(features[used], column[used]).decision_function(test[seen])
            area.append(average_precision(there[seen] > 0, scores))
            eleven.append(average_precision(there[seen] > 0, scores, 11))
            chosen.append(cost)
        low = {str(k): _low_shot(features, targets, test, truth, k, low_costs, samples, seed) for k in shots}
    return {"accuracy": float(np.mean(area)), "eleven_point": float(np.mean(eleven)), "per_class": dict(zip(classes, area)),
            "costs": dict(zip(classes, chosen)), "low_shot": low}


def _low_shot(features, targets, test, truth, k, costs, samples, seed):
    scores = np.zeros((len(costs), samples))  # mAP
    for draw in range(samples):
        for column in range(targets.shape[1]):
            target, seen = targets[:, column], truth[:, column] != 0
            rows = sample(target, k, seed, draw, column)
            for i, cost in enumerate(costs):
                found = machine(cost, seed).fit(features[rows], target[rows]).decision_function(test[seen])
                scores[i, draw] += average_precision(truth[seen, column] > 0, found) / targets.shape[1]
    best = scores[scores.mean(1).argmax()]
    return {"mean": float(best.mean()), "std": float(best.std()), "cost": costs[int(scores.mean(1).argmax())],
            "samples": best.tolist()}
