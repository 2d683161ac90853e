"""The checks that tools/eval.py offers. Each reads its data by options and config, and gives two functions: `look` is all that
a frozen backbone has to see, shared by the ranks where there are several, and `score` makes of what it returns {"accuracy":
the score in 0..1, "chance", and more for the JSON}, on one rank. "shown" are further scores worth a line."""

import platform
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import paddle

import ppdensecl
from ppdensecl import parallel
from ppdensecl.data.sources import spread
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import two_views
from ppdensecl.engine.building import build_source
from ppdensecl.errors import UserError
from ppdensecl.evaluation import correspondence, dense, features, knn, labelled, linear, objects, semi, svm

LABELS = ("knn", "linear", "svm", "semi")  # a class for each picture
# Which task has which option, and its value when none is given.
OPTIONS = {
    "count": dict.fromkeys(("knn", "retrieval", "correspondence"), 400),
    "train_dir": dict.fromkeys(LABELS), "test_dir": dict.fromkeys(LABELS),
    "train_list": dict.fromkeys((*LABELS, "dense")), "test_list": dict.fromkeys((*LABELS, "dense")),
    "root": dict.fromkeys((*LABELS, "dense")), "voc07": {"svm": None},
    "size": dict.fromkeys((*LABELS, "dense", "correspondence")),
    "stage": dict.fromkeys(("knn", "linear", "svm", "dense")),
    "cache": dict.fromkeys(("knn", "linear", "svm", "dense"), "output/features"),
    "shuffle_labels": dict.fromkeys((*LABELS, "dense", "retrieval", "correspondence"), False),
    "neighbours": {"knn": [10, 20, 100, 200]}, "temperature": {"knn": 0.07},
    "lr": {"linear": [30.0], "semi": [0.01], "dense": [0.1]},
    "epochs": {"linear": 100, "semi": 20, "dense": 20},
    "batch_size": {"linear": 256, "semi": 64, "dense": 16},
    "augment": {"linear": False},
    "costs": {"svm": list(svm.COSTS)}, "low_shot_costs": {"svm": list(svm.LOW_SHOT_COSTS)},
    "low_shot": {"svm": list(svm.SHOTS)}, "samples": {"svm": 5},
    "fraction": {"semi": [0.01, 0.1]}, "split": {"semi": None}, "head_lr_multiplier": {"semi": 10.0},
    "classes": {"dense": None},
}
_BOUNDS = {  # (least, greatest); the least of those in brackets is not allowed itself
    "size": (32, 4096), "neighbours": (1, 10**6), "temperature": ((0,), 100), "lr": ((0,), 1e6), "epochs": (1, 10**5),
    "batch_size": (1, 10**6), "costs": ((0,), 1e9), "low_shot_costs": ((0,), 1e9), "low_shot": (1, 10**6), "samples": (1, 1000),
    "fraction": ((0,), 1), "head_lr_multiplier": ((0,), 1e6), "classes": (2, 255), "stage": (1, 4)}


def _check_bounds(option, values):
    least, greatest = _BOUNDS[option]
    for value in values if isinstance(values, list) else [values]:
        open_below = isinstance(least, tuple)
        if not (value > least[0] if open_below else value >= least) or not value <= greatest:
            raise UserError(f"--{option.replace('_', '-')} {value:g}: expected a number {'above' if open_below else 'from'} "
                            f"{least[0] if open_below else least} to {greatest:g}")


def resolve(task, given):
    """The options of a task, from {option: value or None}. Raises UserError for one that the task does not have or allow."""
    for option, value in given.items():
        if value is not None and task not in OPTIONS[option]:
            raise UserError(f"--{option.replace('_', '-')} is not used by --task {task}, but by {', '.join(OPTIONS[option])}")
        if value is not None and option in _BOUNDS:
            _check_bounds(option, value)
    if len(given.get("size") or []) > 2:
        raise UserError("--size takes one number, or the height and the width")
    found = {option: defaults[task] if given.get(option) is None else given[option]
             for option, defaults in OPTIONS.items() if task in defaults}
    for option, several in (("lr", "linear"), ("stage", "dense")):
        if task != several and len(found.get(option) or []) > 1:
            raise UserError(f"--{option}: several are for --task {several}; --task {task} takes one")
    if task != "dense" and found.get("stage"):
        (found["stage"],) = found["stage"]
    return SimpleNamespace(**found)


def knn_classes(options, config):
    """Class of labelled pictures by a vote of neighbours; of objects of synthetic scenes where no pictures are given."""
    if not any((options.train_dir, options.test_dir, options.train_list, options.test_list)):
        return _knn_objects(options, config)
    train, test, _ = _labelled(options, config)
    ks = [k for k in options.neighbours if k <= len(train)] or [len(train)]

    def score(seen):
        _, bank, queries, computed = seen
        similarity, index = knn.neighbours(bank, queries, max(ks))
        by_k = {k: float((knn.vote(similarity, train.labels[index], k, options.temperature) == test.labels).mean()) for k in ks}
        return {"accuracy": by_k[20] if 20 in by_k else by_k[ks[0]], "chance": _largest(test.labels),
                "shown": {f"k = {k}": share for k, share in by_k.items()}, "pictures_extracted": computed}
    return _looker(train, test, options, config, options.stage), score


def _knn_objects(options, config):
    source, count, size = build_source(config), options.count, config.data.size
    if not isinstance(source, SyntheticSource):
        raise UserError("--task knn needs labels, which only data.source=synthetic has; give labelled pictures with --train-dir "
                        "and --test-dir, or use --task retrieval")
    # Another seed makes other scenes, which training never saw. Half of `count` for the bank, half for the queries.
    unseen = SyntheticSource(count, source.seed + 1, source.size)
    (bank, labels), (queries, truth) = (objects.crops(unseen, part) for part in (range(count // 2), range(count // 2, count)))
    labels, truth = _maybe_shuffled(labels, 0, options, config), _maybe_shuffled(truth, 1, options, config)

    def score(backbone):
        found = knn.classify(features.pooled(backbone, bank, size), labels, features.pooled(backbone, queries, size))
        return {"accuracy": float((found == truth).mean()), "chance": _largest(truth)}
    return _alone, score


def _maybe_shuffled(labels, part, options, config):
    return np.random.default_rng([config.seed, part]).permutation(labels) if options.shuffle_labels else labels


def retrieval(options, config):
    """Is the other view of a picture found among the other views of all `count` pictures? Needs no labels."""
    source, augmentation = build_source(config), Augmentation(size=config.data.size)

    def score(backbone):
        views = [two_views(picture, augmentation, config.seed + 1, 0, index)
                 for index, picture in spread(source, options.count)]
        if len(views) < 2:
            raise UserError("--task retrieval needs at least 2 pictures to choose from, and found "
                            f"{len(views)} that can be decoded in 'data' ({len(source)} listed)")
        found = [features.pooled(backbone, [pair[view] for pair in views], config.data.size) for view in (0, 1)]
        return {"accuracy": knn.retrieval(found[0], _maybe_shuffled(found[1], 0, options, config)), "chance": 1 / len(views)}
    return _alone, score


def matching(options, config):
    """Share of query cells matched to within one cell of the truth."""
    source = build_source(config)
    augmentation = Augmentation(size=_size(options, config)) if options.size else correspondence.larger_views(config.data.size)

    def score(backbone):
        found = correspondence.matched_share(backbone, source, augmentation, config.seed + 1, options.count,
                                             options.shuffle_labels)
        if not found.chance > 0:
            raise UserError("--task correspondence: no pair of views shares a cell, of those pictures of 'data' that can be "
                            f"decoded ({len(source)} listed); give more pictures, or a greater --count")
        return {"accuracy": found.right, "chance": found.chance,
                "shown": {"each cell matched to its own position": found.own,
                          "cells whose own position is wrong": found.elsewhere, "cells that chose their own position": found.stayed}}
    return _alone, score


def linear_probe(options, config):
    """One linear layer on pooled features: of the middle of each picture, or with --augment of a new crop in each epoch."""
    train, test, classes = _labelled(options, config)

    def score(seen):
        backbone, frozen, queries, computed = seen

        def cropped_epochs(rows):
            part = train.only(rows)

            def epoch_of(epoch):
                groups = linear.order(config.seed, epoch, len(rows), options.batch_size)
                views = features.batches(part, groups, semi.cropped(_size(options, config), config.seed, epoch))
                for group, batch in zip(groups, views):
                    yield features.features(backbone, batch, options.stage), part.labels[group]
            return epoch_of

        def kept_epochs(rows):
            return linear.rows(frozen, train.labels, rows, config.seed, options.batch_size)

        found = linear.probe(cropped_epochs if options.augment else kept_epochs, lambda rows: frozen[rows], train.labels,
                             queries, test.labels, len(classes), options.lr, options.epochs, config.seed)
        return {**found, "chance": _largest(test.labels), "shown": {"top 5": found["top5"]} if len(classes) > 5 else {},
                "pictures_extracted": computed}
    return _looker(None if options.augment and len(options.lr) == 1 else train, test, options, config, options.stage), score


def svm_classes(options, config):
    """Mean average precision of linear SVMs, with all labels and with few: on VOC2007, or on pictures of one class each."""
    svm.need_sklearn()
    if options.voc07 and any((options.train_dir, options.test_dir, options.train_list, options.test_list)):
        raise UserError("--voc07 and other labelled pictures are given; use one of them")
    if options.voc07:
        train, test, classes = _maybe_shuffled_pair(*labelled.open_voc07(options.voc07), options, config)
    else:
        train, test, classes = _labelled(options, config)
        for pictures in (train, test):
            pictures.labels = np.where(pictures.labels[:, None] == np.arange(len(classes)), 1, -1).astype(np.int8)
    known = test.labels != 0

    def score(seen):
        _, bank, queries, computed = seen
        found = svm.probe(bank, train.labels, queries, test.labels, classes, options.costs, options.low_shot_costs,
                          options.low_shot, options.samples, config.seed)
        shown = {"11-point": found["eleven_point"], **{f"k = {k}": low["mean"] for k, low in found["low_shot"].items()}}
        return {**found, "chance": float(((test.labels > 0).sum(0) / known.sum(0)).mean()), "shown": shown,
                "pictures_extracted": computed}
    return _looker(train, test, options, config, options.stage), score


def semi_supervised(options, config):
    """Fine-tuning on shares of the labels, or on listed pictures; the score is that of the first share."""
    train, test, classes = _labelled(options, config)
    if options.split:
        parts = {"listed": train.only(semi.listed(train, options.split))}
    else:
        parts = {f"{100 * fraction:g} %": train.only(semi.split(train.labels, fraction, config.seed))
                 for fraction in options.fraction}

    def score(backbone):
        found = {share: semi.probe(backbone, part, test, len(classes), _size(options, config), options.lr[0],
                                   options.head_lr_multiplier, options.epochs, options.batch_size, config.seed)
                 for share, part in parts.items()}
        shown = {f"{share} of the labels": scores["accuracy"] for share, scores in found.items()}
        return {"accuracy": next(iter(found.values()))["accuracy"], "chance": _largest(test.labels), "by_fraction": found,
                "shown": shown, "pictures": {share: [part.shown(i) for i in range(len(part))] for share, part in parts.items()}}
    return _alone, score


def dense_probe(options, config):
    """Mean IoU of a linear segmentation of one stage's map, or of the maps of several."""
    train, test = (labelled.open_segmentation(option, path, options.root) for option, path in (
        ("--train-list", options.train_list), ("--test-list", options.test_list)))
    # Of the control the truth stays: a probe that was trained on it by mistake would be seen.
    labels, truth = dense.LabelMaps(train, config.seed if options.shuffle_labels else None), dense.LabelMaps(test)
    classes, pixels = dense.count_classes(labels, options.classes)
    chance, size = dense.chance(pixels, truth), _size(options, config)

    def look(backbone):
        each = [_looker(train, test, options, config, stage, "map", features.whole)(backbone) for stage in options.stage or [None]]
        _, maps, queries, computed = zip(*each)
        return maps, queries, sum(computed)

    def score(seen):
        maps, queries, computed = seen
        found = dense.probe(maps, labels, queries, truth, classes, size, options.lr[0], options.epochs, options.batch_size,
                            config.seed)
        shown = {"pixels": found["pixel_accuracy"], "scattered": found["by_chance"]}
        return {**found, "chance": chance, "shown": shown, "pictures_extracted": computed}
    return look, score


def _labelled(options, config):
    return _maybe_shuffled_pair(*labelled.open_pair(options.train_dir, options.test_dir, options.train_list, options.test_list,
                                                    options.root), options, config)


def _maybe_shuffled_pair(train, test, classes, options, config):
    if options.shuffle_labels:
        train, test = labelled.shuffled(train, config.seed, 0), labelled.shuffled(test, config.seed, 1)
    return train, test, classes


def _size(options, config):
    return tuple((options.size * 2)[:2]) if options.size else config.data.size


def _alone(backbone):
    """The `look` of a task that needs the backbone itself, and so one process."""
    if parallel.world_size() > 1:
        raise UserError("this task runs in one process; only knn of labelled pictures, linear, svm and dense share the "
                        "extraction of features among several")
    return backbone


def _looker(train, test, options, config, stage, pooling="mean", view=features.centre):
    """The `look` of a task on frozen features: backbone → (backbone, features of the training pictures or None, of the test
    pictures, how many pictures were computed and not kept)."""
    def look(backbone):
        size = _size(options, config)
        found = [(None, 0) if pictures is None else features.extract(
            backbone, pictures, size, options.cache, stage, pooling, view) for pictures in (train, test)]
        return backbone, found[0][0], found[1][0], found[0][1] + found[1][1]
    return look


def _largest(labels):
    return float(np.bincount(labels).max() / len(labels))


TASKS = {"knn": knn_classes, "retrieval": retrieval, "correspondence": matching, "linear": linear_probe, "svm": svm_classes,
         "semi": semi_supervised, "dense": dense_probe}


def environment():
    """Versions that a score may depend on."""
    found = {"ppdensecl": ppdensecl.__version__, "python": platform.python_version(), "paddle": paddle.__version__,
             "device": paddle.get_device(), "machine": platform.platform()}
    for name in ("numpy", "pillow", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
