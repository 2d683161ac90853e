"""All pictures of a run, drawn into RUN/pictures from its log and a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from ppdensecl.config import load_config
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.sources import spread
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import two_views
from ppdensecl.engine import device
from ppdensecl.engine.trainer import build_source
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features
from ppdensecl.evaluation.correspondence import larger_views
from ppdensecl.visual import cells
from ppdensecl.visual.curves import draw_curves, read_correspondence, read_log
from ppdensecl.visual.figure import save, sheet
from ppdensecl.visual.pca import draw_pca
from ppdensecl.visual.retrieval import draw_retrieval
from ppdensecl.visual.views import pair_sheet

_ROWS = 6  # of pca.png and retrieval.png


def draw_run_curves(run):
    """Writes RUN/pictures/curves.png. Raises UserError."""
    run = Path(run)
    config, log = load_config(run / "config.yaml"), run / "train.log"
    draw_curves(read_log(log), read_correspondence(log), config.model.queue_len, _folder(run) / "curves.png")


def draw_run(run, checkpoint="latest", matches=4, threshold=0.9, cell=None, count=100):
    """Writes all pictures of RUN/pictures, and returns that folder.

    Args:
        run: the output_dir of a run.
        checkpoint: name in that folder.
        matches: pictures that matches_N.png, mutual_N.png and similarity_N.png are drawn of.
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
    folder = _folder(run)

    size, seed = config.data.size, config.seed + 1  # as tools/eval.py: views that training did not see
    loader = PairLoader(source, Augmentation(size=size), min(12, len(source)), config.seed, max_bad_fraction=1)
    _draw_views(next(loader.batches([0])), folder / "views.png")

    trained = features.load_backbone(run / checkpoint)
    start = features.random_backbone(trained.depth, len(trained.feat_channels), config.seed)
    iteration = read_states(run / checkpoint).get("iteration")
    backbones = {f"iteration {iteration}" if isinstance(iteration, int) else "trained": trained, "random start": start}
    for number, (index, picture) in enumerate(_some(source, matches)):
        view = (picture, larger_views(size), seed, index)
        cells.draw_pair(backbones, view, folder / f"matches_{number}.png")
        cells.draw_mutual(backbones, view, threshold, folder / f"mutual_{number}.png")
        cells.draw_similarity(backbones, view, cell, folder / f"similarity_{number}.png")
    for path in folder.glob("*.png"):  # of an earlier call that drew more
        numbered = re.fullmatch(r"(?:matches|mutual|similarity)_(\d{1,9})", path.stem)
        if numbered and int(numbered.group(1)) > number:
            path.unlink()

    largest = tuple(4 * side for side in size)  # for a map with cells to see
    pictures = np.stack([features.centre(picture, largest) for _, picture in _some(source, _ROWS)])
    draw_pca(pictures, {name: _maps(backbone, pictures) for name, backbone in backbones.items()}, folder / "pca.png")

    views = [two_views(picture, Augmentation(size=size), seed, 0, index) for index, picture in _some(source, count)]
    views = np.stack(views, 1)
    pooled = {name: [features.pooled(backbone, part, size) for part in views] for name, backbone in backbones.items()}
    shown = np.unique(np.linspace(0, views.shape[1] - 1, _ROWS).astype(int))
    draw_retrieval(views, pooled, shown, folder / "retrieval.png")
    return folder


def _some(source, count):
    """As `spread`, but a picture that stands in for a broken one comes once."""
    seen = set()
    for index, picture in spread(source, count):
        if index not in seen:
            seen.add(index)
            yield index, picture


def read_states(path):
    """What a checkpoint's .pdstates says, {} where there is none that can be read; `path` without suffix."""
    try:
        states = json.loads(Path(f"{path}.pdstates").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return states if isinstance(states, dict) else {}


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
