"""A linear segmentation probe: one 1×1 convolution on a frozen feature map, bilinearly enlarged.

Of several stages each map has its convolution, and their enlarged results are added: the same as one convolution on all maps,
enlarged and laid upon each other, without that stack in memory. The features are brought to mean 0 and deviation 1 by channel
first (over the training maps): still linear, and the same rate fits all stages and backbones. SGD with momentum 0.9, cross
entropy at the size of the view, the rate falling by (1 − t)^0.9. The test is at the full size of the labels.
"""

import os

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

import cv2

from ppdensecl.errors import UserError
from ppdensecl.evaluation import linear

IGNORED = 255


class LabelMaps:
    """The label maps of a list, read when asked for: maps[i] is uint8 [H, W], the class or 255 where it is ignored."""

    def __init__(self, pictures, shuffle_seed=None):
        self.pictures, self.shuffle_seed = pictures, shuffle_seed
        self.order = np.arange(len(pictures))
        if shuffle_seed is not None:
            self.order = np.random.default_rng([shuffle_seed, 5]).permutation(self.order)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        path = os.path.join(self.pictures.root, self.pictures.labels[self.order[i]])
        try:
            with Image.open(path) as picture:
                mode, labels = picture.mode, np.array(picture)
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a label map ({error.strerror or 'not a picture'})") from None
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise UserError(f"{path}: is a picture of mode {mode}; a label map has one channel of 8 bits (or a palette) that "
                            "holds the class, 255 for what is ignored")
        # The control. Each picture has the labels of another one, for what a picture shows can be learned from how much of each
        # class it has; and their pixels change places, for all pictures of a street have the road below.
        if self.shuffle_seed is not None:
            labels = np.random.default_rng([self.shuffle_seed, 6, i]).permutation(labels.ravel()).reshape(labels.shape)
        return labels


def count_classes(maps, given=None):
    """(number of classes, int64 [classes] pixels of each) of the training maps; the number is `given` or the highest + 1."""
    pixels = sum(np.bincount(maps[i].ravel(), minlength=256) for i in range(len(maps)))
    pixels[IGNORED] = 0
    highest = int(np.flatnonzero(pixels).max(initial=-1))
    if given is not None and highest >= given:
        raise UserError(f"--classes {given}: the training labels hold the class {highest}; give {highest + 1} or more")
    classes = given or highest + 1
    if classes < 2:
        raise UserError("the training labels hold less than two classes; is the list right?")
    return classes, pixels[:classes]


def confusion(truth, found, classes):
    """int64 [classes, classes]: pixels of class row that were taken for class column; truth and found integers of one shape."""
    known = truth != IGNORED
    return np.bincount(classes * truth[known].astype(np.int64) + found[known], minlength=classes**2).reshape(classes, classes)


def mean_iou(matrix):
    """(mean, float64 [classes]) of intersection / union; NaN, and not in the mean, for a class neither there nor found."""
    common = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - common
    each = np.where(union > 0, common / np.maximum(union, 1), np.nan)
    return float(np.nanmean(each)), each


def statistics(maps, block=16):
    """(mean, deviation), float32 [C], of maps [n, C, h, w] by channel."""
    total = square = 0.0
    for start in range(0, len(maps), block):
        part = np.asarray(maps[start : start + block], np.float64)
        total, square = total + part.sum((0, 2, 3)), square + (part**2).sum((0, 2, 3))
    count = len(maps) * maps.shape[2] * maps.shape[3]
    mean = total / count
    return mean.astype(np.float32), np.sqrt(np.maximum(square / count - mean**2, 1e-12)).astype(np.float32)


def _scores(layers, maps, moments, chosen, size):
    """Of each stage its layer, maps float32 [n, C, h, w] and (mean, deviation): the chosen rows → logits [b, classes, *size]."""
    return sum(_enlarged(layer(paddle.to_tensor((stage[chosen] - mean[:, None, None]) / deviation[:, None, None])), size)
               for layer, stage, (mean, deviation) in zip(layers, maps, moments))


def _enlarged(x, size):
    """Bilinear, [b, C, h, w] → [b, C, *size], as two products: half of the time of F.interpolate on a CPU."""
    rows, columns = (F.interpolate(paddle.eye(n).reshape([1, n, n, 1]), (m, 1), mode="bilinear").reshape([n, m])
                     for n, m in zip(x.shape[2:], size))
    return rows.t() @ x @ columns


def probe(maps, labels, test, truth, classes, size, lr, epochs, batch_size, seed):
    """Trains and scores: {"accuracy": mIoU, "by_chance", "per_class", "pixel_accuracy"}. by_chance is the mIoU to be expected if
    the pixels that were found in a picture lay anywhere in it: what the control must give.

    maps: of each stage float32 [n, C, h, w], test: of each [m, C, h, w] (memory maps); labels, truth: `LabelMaps` of n and m;
    size (height, width).
    """
    moments = [statistics(stage) for stage in maps]
    paddle.seed(seed)
    layers = paddle.nn.LayerList(paddle.nn.Conv2D(stage.shape[1], classes, 1, weight_attr=paddle.nn.initializer.Normal(0, 0.01))
                                 for stage in maps)
    optimizer = paddle.optimizer.Momentum(lr, 0.9, layers.parameters())
    steps, step = epochs * len(linear.order(seed, 0, len(labels), batch_size)), 0
    for epoch in range(epochs):
        for chosen in linear.order(seed, epoch, len(labels), batch_size):
            optimizer.set_lr(lr * (1 - step / steps) ** 0.9)
            chosen, step = np.sort(chosen), step + 1
            y = np.stack([cv2.resize(labels[i], size[::-1], interpolation=cv2.INTER_NEAREST) for i in chosen.tolist()])
            known = int((y != IGNORED).sum())
            losses = F.cross_entropy(_scores(layers, maps, moments, chosen, size), paddle.to_tensor(y.astype(np.int64)),
                                     ignore_index=IGNORED, axis=1, reduction="sum")
            (losses / max(1, known)).backward()
            optimizer.step()
            optimizer.clear_grad()
    matrix = scattered = 0
    for i in range(len(truth)):
        one = _confusion_of(layers, test, truth, i, moments, classes)
        matrix, scattered = matrix + one, scattered + np.outer(one.sum(1), one.sum(0)) / max(1, one.sum())
    mean, each = mean_iou(matrix)
    return {"accuracy": mean, "by_chance": mean_iou(scattered)[0],
            "pixel_accuracy": float(np.diag(matrix).sum() / max(1, matrix.sum())),
            "per_class": [None if np.isnan(iou) else float(iou) for iou in each]}


@paddle.no_grad()
def _confusion_of(layers, test, truth, i, moments, classes):
    labels = truth[i]
    _check(labels, classes, truth, i)
    return confusion(labels, _scores(layers, test, moments, slice(i, i + 1), labels.shape).argmax(1).numpy()[0], classes)


def _check(labels, classes, truth, i):
    beyond = labels[(labels >= classes) & (labels != IGNORED)]
    if len(beyond):
        raise UserError(f"{truth.pictures.labels[i]}: holds the class {beyond.max()}, which no training label has "
                        f"({classes} classes); give --classes {beyond.max() + 1}, or mend the lists")


def chance(pixels, truth):
    """mIoU of calling every pixel the most frequent class of the training maps."""
    classes, matrix = len(pixels), 0
    for i in range(len(truth)):
        labels = truth[i]
        _check(labels, classes, truth, i)
        matrix = matrix + confusion(labels, np.full(labels.shape, pixels.argmax()), classes)
    return mean_iou(matrix)[0]
