"""Nearest neighbours over frozen features (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018): labels by weighted vote, and whether the other view of a picture is found."""

import numpy as np


def unit(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def neighbours(bank, queries, k):
    """The k nearest of the bank by cosine, the nearest first: (similarity float [m, k], index int64 [m, k]).

    bank [n, C], queries [m, C] float, also memory maps: 1.3 million rows are gone through in blocks.
    """
    k = min(k, len(bank))
    similarity, index = [], []
    for start in range(0, len(queries), 1024):
        query = unit(queries[start : start + 1024])
        best, where = np.empty((len(query), 0)), np.empty((len(query), 0), np.int64)
        for first in range(0, len(bank), 65536):
            near, at = _highest(query @ unit(bank[first : first + 65536]).T, k)
            best, where = np.concatenate([best, near], 1), np.concatenate([where, first + at], 1)
            best, at = _highest(best, k)
            where = np.take_along_axis(where, at, 1)
        order = np.argsort(-best, axis=1, kind="stable")
        similarity.append(np.take_along_axis(best, order, 1))
        index.append(np.take_along_axis(where, order, 1))
    return np.concatenate(similarity), np.concatenate(index)


def _highest(values, k):
    """The k highest of each row, in no order, and their columns."""
    columns = np.argpartition(-values, min(k, values.shape[1]) - 1, axis=1)[:, :k]
    return np.take_along_axis(values, columns, 1), columns


def vote(similarity, labels, k, temperature=0.07):
    """int64 [m]: the class that the first k neighbours ([m, K], nearest first) vote for by exp(cosine / τ)."""
    weights = np.exp(similarity[:, :k] / temperature)
    votes = np.zeros((len(weights), labels.max() + 1))
    np.add.at(votes, (np.arange(len(weights))[:, None], labels[:, :k]), weights)
    return votes.argmax(1)


def classify(bank, labels, queries, k=20, temperature=0.07):
    """The class of each query by a vote of its k nearest in the bank, each with weight exp(cosine / τ).

    bank [n, C], labels int64 [n], queries [m, C] float → int64 [m].
    """
    similarity, index = neighbours(bank, queries, k)
    return vote(similarity, labels[index], k, temperature)


def retrieval(first, second):
    """Share of pictures whose second view is the nearest of all second views to their first: [n, C], [n, C] → float."""
    return float(((unit(first) @ unit(second).T).argmax(1) == np.arange(len(first))).mean())
