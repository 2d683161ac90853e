"""Semi-supervised: the whole network fine-tuned on a small, class-balanced share of the labels, the head with a larger rate.

Random crops and flips in training, the middle of the picture in the test; SGD with momentum 0.9, a tenth of the rate from 60 and
from 80 % of the epochs on; BatchNorm learns and keeps statistics as in pre-training.
"""

import os

import numpy as np
import paddle
import paddle.nn.functional as F

from ppdensecl.data.source import contents, existing
from ppdensecl.data.transforms import Augmentation
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features, linear
from ppdensecl.models import ResNet
from ppdensecl.models.densecl import normalise
from ppdensecl.rng import Purpose, generator


def crops(size):
    """The training view of supervised ImageNet: crops of 8 to 100 % of the area, and flips; no colours are changed."""
    return Augmentation(size=size, scale=(0.08, 1.0), jitter_p=0, gray_p=0, blur_p=0)


def cropped(size, seed, epoch):
    """(picture, index) → the random view of that picture in that epoch, as `features.batches` asks for."""
    augmentation = crops(size)

    def view(picture, index):
        return augmentation.apply(picture, augmentation.draw(generator(seed, Purpose.VIEW, epoch, index, 0), *picture.shape[:2]))
    return view


def split(labels, fraction, seed):
    """int64 [≈ fraction · n], ascending: as many pictures of each class, one at least; the same for the same seed."""
    classes = np.unique(labels)
    each = max(1, round(fraction * len(labels) / len(classes)))
    rng = np.random.default_rng([seed, 4])
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:each] for label in classes]))


def listed(pictures, path):
    """int64 [n], ascending: the pictures whose names stand in a file, a line each, with folders or without (as SimCLR's
    1percent.txt, which others use too). Raises UserError where one is not among the pictures."""
    path = existing("--split", path, "a text file with a picture's name on each line", os.path.isfile)
    lines = [line.strip() for line in contents("--split", path).splitlines() if line.strip()]
    places, ambiguous = {}, set()
    for i in range(len(pictures)):
        short = os.path.basename(pictures.names[i])
        ambiguous |= {short} & places.keys()
        places[short] = i
    places.update({pictures.names[i]: i for i in range(len(pictures))})
    for line in lines:
        if line in ambiguous and b"/" not in line:
            raise UserError(f"--split {path}: several training pictures are called {os.fsdecode(line)}; write CLASS/NAME")
    missing = [line for line in lines if line not in places]
    if missing or not lines:
        raise UserError(f"--split {path}: " + (f"{os.fsdecode(missing[0])} is none of the training pictures ({len(missing)} of "
                                               f"{len(lines)} are not)" if missing else "lists no pictures"))
    return np.unique([places[line] for line in lines])


def probe(backbone, train, test, classes, size, lr, head_multiplier, epochs, batch_size, seed):
    """Fine-tunes a copy of the backbone on all of `train`: {"accuracy", "top5"} on `test` (both `labelled.Labelled`)."""
    copy = ResNet(backbone.depth, stages=len(backbone.feat_channels))
    copy.set_state_dict(backbone.state_dict())
    paddle.seed(seed)
    head = paddle.nn.Linear(backbone.feat_channels[-1], classes, weight_attr=paddle.nn.initializer.Normal(0, 0.01))
    optimizer = paddle.optimizer.Momentum(lr, 0.9, [
        {"params": copy.parameters()}, {"params": head.parameters(), "learning_rate": head_multiplier}], weight_decay=1e-4)
    copy.train()
    for epoch in range(epochs):
        optimizer.set_lr(linear.rate(lr, epoch, epochs))
        groups = linear.order(seed, epoch, len(train), batch_size)
        for indices, views in zip(groups, features.batches(train, groups, cropped(size, seed, epoch))):
            scores = head(copy(normalise(paddle.to_tensor(views))).mean([2, 3]))
            F.cross_entropy(scores, paddle.to_tensor(train.labels[indices])).backward()
            optimizer.step()
            optimizer.clear_grad()
    copy.eval()
    scores = np.concatenate([linear.predict(head, features.features(copy, views)) for views in features.batches(
        test, features.in_order(len(test)), lambda picture, _: features.centre(picture, size))])
    if not np.isfinite(scores).all():
        raise UserError(f"--lr {lr:g}: fine-tuning diverged; give a smaller one")
    return {"accuracy": linear.accuracy(scores, test.labels), "top5": linear.accuracy(scores, test.labels, min(5, classes))}
