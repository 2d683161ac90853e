"""Nearest neighbours over frozen features (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018): labels by weighted vote, and whether the other view of a picture is found."""

import numpy as np


def unit(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def classify(bank, labels, queries, k=20, temperature=0.07):
    """The class of each query by a vote of its k nearest in the bank, each with weight exp(cosine / τ).

    bank [n, C], labels int64 [n], queries [m, C] float → int64 [m].
    """
    similarity = unit(queries) @ unit(bank).T
    nearest = np.argpartition(-similarity, min(k, len(bank)) - 1, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    votes = np.zeros((len(queries), labels.max() + 1))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[nearest]), weights)
    return votes.argmax(1)


def retrieval(first, second):
    """Share of pictures whose second view is the nearest of all second views to their first: [n, C], [n, C] → float."""
    return float(((unit(first) @ unit(second).T).argmax(1) == np.arange(len(first))).mean())
