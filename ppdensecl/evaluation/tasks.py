"""The checks that tools/eval.py offers: each takes a frozen backbone and the data section of a config, and gives numbers."""

import numpy as np

from ppdensecl.data.sources import spread
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import two_views
from ppdensecl.errors import UserError
from ppdensecl.evaluation import correspondence, features, knn, objects


def knn_objects(backbone, source, data, seed, count):
    """Class of an object of the synthetic scenes by its neighbours; bank and queries are scenes that training never saw."""
    if not isinstance(source, SyntheticSource):
        raise UserError("--task knn needs labels, which only data.source=synthetic has; use --task retrieval")
    # Another seed makes other scenes. Half of `count` for the bank, half for the queries.
    unseen = SyntheticSource(count, source.seed + 1, source.size)
    bank, labels = objects.crops(unseen, range(count // 2))
    queries, truth = objects.crops(unseen, range(count // 2, count))
    found = knn.classify(features.pooled(backbone, bank, data.size), labels, features.pooled(backbone, queries, data.size))
    return {"accuracy": float((found == truth).mean()), "chance": float(np.bincount(truth).max() / len(truth))}


def retrieval(backbone, source, data, seed, count):
    """Is the other view of a picture found among the other views of all `count` pictures? Needs no labels."""
    augmentation = Augmentation(size=data.size)
    views = [two_views(picture, augmentation, seed + 1, 0, index) for index, picture in spread(source, count)]
    found = [features.pooled(backbone, (pair[view] for pair in views), data.size) for view in (0, 1)]
    return {"accuracy": knn.retrieval(*found), "chance": 1 / len(views)}


def matching(backbone, source, data, seed, count):
    """Share of query cells matched to within one cell of the truth, on views of twice the training size: the map of a small
    view has too few cells to be wrong by more than one."""
    size = tuple(2 * side for side in data.size)
    share, chance = correspondence.matched_share(backbone, source, Augmentation(size=size), seed + 1, count)
    return {"accuracy": share, "chance": chance}


TASKS = {"knn": knn_objects, "retrieval": retrieval, "correspondence": matching}
