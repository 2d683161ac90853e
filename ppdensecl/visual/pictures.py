"""All pictures of a run, drawn into RUN/pictures from its log and a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from pathlib import Path

import numpy as np

from ppdensecl.config import load_config
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.source import sha256_of
from ppdensecl.data.sources import spread
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import draw_views, grid_correspondence, two_views
from ppdensecl.engine import device
from ppdensecl.engine.building import build_source
from ppdensecl.engine.checkpoint import write_text
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features
from ppdensecl.evaluation.correspondence import larger_views, normalising
from ppdensecl.visual import cells
from ppdensecl.visual.curves import draw_curves, read_correspondence, read_log
from ppdensecl.visual.figure import save, sheet
from ppdensecl.visual.pca import draw_pca
from ppdensecl.visual.retrieval import draw_retrieval
from ppdensecl.visual.views import pair_sheet

_ROWS = 6  # of pca.png and retrieval.png
_SHARED = 0.25  # of the query view's cells, that the key view must show for a pair of views to be drawn
_DRAWN = "checkpoint.json"  # of RUN/pictures: which checkpoint they are of


def draw_run_curves(run):
    """Writes RUN/pictures/curves.png. Raises UserError."""
    run = Path(run)
    config, log = load_config(run / "config.yaml"), run / "train.log"
    draw_curves(read_log(log), read_correspondence(log), config.model.queue_len, _folder(run) / "curves.png")


def draw_run(run, checkpoint="latest", matches=4, threshold=0.9, cell=None, count=100):
    """Writes all pictures of RUN/pictures, and which checkpoint they are of, for `drawn_of`; returns that folder.

    Args:
        run: the output_dir of a run.
        checkpoint: name in that folder.
        matches: pictures that matches_N.png, mutual_N.png and similarity_N.png are drawn of, at most: the next ones are taken
            for those whose views share too little.
        threshold: cosine that mutual matches must exceed.
        cell: (row, column) of similarity_N.png, None for one with contrast.
        count: pictures that retrieval.png searches.

    Raises UserError.
    """
    run = Path(run)
    config = load_config(run / "config.yaml")
    device.select(config.device)
    source = build_source(config)
    if not next(spread(source, 1), None):
        raise UserError(f"{run}: none of the {len(source)} pictures of its data can be decoded, as {source.name(0)}; "
                        "mend them, or 'data' in the run's config.yaml")
    draw_run_curves(run)

    size, seed = config.data.size, config.seed + 1  # as tools/eval.py: views that training did not see
    of = identity(run / checkpoint)
    trained = features.load_backbone(run / checkpoint)
    pairs = _overlapping(source, matches, larger_views(size), 2 ** (1 + len(trained.feat_channels)), seed)
    first = next(pairs, None)
    if not first:
        raise UserError(f"{run}: of none of its {len(source)} pictures do the two views share {_SHARED:.0%} of their cells; "
                        "'data' in the run's config.yaml needs more pictures")

    folder = _folder(run)
    write_text(folder / _DRAWN, "{}")  # until all of them are of one checkpoint
    loader = PairLoader(source, Augmentation(size=size), min(12, len(source)), config.seed, max_bad_fraction=1)
    _draw_views(next(loader.batches([0])), folder / "views.png")

    name = "trained" if of["iteration"] is None else f"iteration {of['iteration']}"
    start = features.random_backbone(trained.depth, len(trained.feat_channels), config.seed)
    backbones = {name: trained, "random start": normalising(start, source, larger_views(size), seed)}
    for number, view in enumerate(itertools.chain([first], pairs)):
        cells.draw_pair(backbones, view, folder / f"matches_{number}.png")
        cells.draw_mutual(backbones, view, threshold, folder / f"mutual_{number}.png")
        cells.draw_similarity(backbones, view, cell, folder / f"similarity_{number}.png")
    for path in folder.glob("*.png"):  # of an earlier call that drew more
        numbered = re.fullmatch(r"(?:matches|mutual|similarity)_(\d{1,9})", path.stem)
        if numbered and int(numbered.group(1)) > number:
            path.unlink()

    largest = tuple(4 * side for side in size)  # for a map with cells to see
    pictures = np.stack([features.centre(picture, largest) for _, picture in spread(source, _ROWS)])
    draw_pca(pictures, {name: _maps(backbone, pictures) for name, backbone in backbones.items()}, folder / "pca.png")

    views = [two_views(picture, Augmentation(size=size), seed, 0, index) for index, picture in spread(source, count)]
    views = np.stack(views, 1)
    pooled = {title: [features.pooled(backbone, part, size) for part in views]
              for title, backbone in {**backbones, "random start": start}.items()}  # as tools/eval.py
    shown = np.unique(np.linspace(0, views.shape[1] - 1, _ROWS).astype(int))
    draw_retrieval(views, pooled, shown, folder / "retrieval.png")
    write_text(folder / _DRAWN, json.dumps(of, indent=1))
    return folder


def _overlapping(source, count, augmentation, stride, seed):
    """What `matched_pair` takes after the backbone, of about `count` pictures spread over a source, or the next ones for those
    that are broken, or whose views share too little. Only the crops decide that, no result."""
    grid, seen = tuple(-(-side // stride) for side in augmentation.size), set()
    for start, _ in spread(source, count):
        for index in (at % len(source) for at in range(start, start + len(source))):
            if index in seen:
                continue
            seen.add(index)
            with contextlib.suppress(UndecodableError):
                picture = source.picture(index)
                params = draw_views(augmentation, *picture.shape[:2], seed, 0, index)
                if grid_correspondence(*params, grid)[1].mean() >= _SHARED:
                    yield picture, augmentation, seed, index
                    break


def read_states(path):
    """What a checkpoint's .pdstates says, {} where there is none that can be read; `path` without suffix."""
    return _read_dict(Path(f"{path}.pdstates"))


def identity(path):
    """{"checkpoint": its name, "iteration": int or None, "sha256": of its weights}; `path` without suffix. Raises UserError."""
    iteration, weights = read_states(path).get("iteration"), Path(features.weights_file(path))
    try:
        return {"checkpoint": weights.stem, "iteration": iteration if isinstance(iteration, int) else None,
                "sha256": sha256_of(weights)}
    except OSError as error:
        raise UserError(f"{weights}: cannot be read ({error.strerror}); give the name of a checkpoint of the run") from None


def drawn_of(run):
    """The `identity` of the checkpoint that the pictures of a run are of, {} where it is not known. Foreign text: check it."""
    return _read_dict(Path(run) / "pictures" / _DRAWN)


def _read_dict(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _maps(backbone, pictures):
    """One by one: large pictures take memory."""
    return np.concatenate([features.features(backbone, picture[None], pooling="map") for picture in pictures])


def _folder(run):
    folder = run / "pictures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); move what has that name") from None
    return folder


def _draw_views(views, path):
    """Writes pairs of views, uint8 [2, N, h, w, 3], as a PNG."""
    drawn = pair_sheet(views)
    figure, axes = sheet(1, 1, 11, 0.7 + 10.8 * drawn.shape[0] / drawn.shape[1])
    axes[0, 0].imshow(drawn)
    figure.suptitle("Pairs of views as training sees them: each a query view and its key view", fontsize=11)
    save(figure, path)
