"""Pairs of views a second, ours against the authors' pipeline on Pillow: python benchmarks/data.py [--pictures FOLDER]

Both make the same pairs of 224 x 224 (the crops and factors are drawn by us) from the same files: 500 x 375 JPEGs made of the
pictures in FOLDER, or of procedural scenes, and an LMDB that tools/prepare_data.py makes of these with --short-side 256. One
core each, by CPU time; PairLoader with worker processes by the clock. Writes docs/benchmarks/data.{json,md,png}.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import measure
from measure import ROOT

import cv2
import numpy as np
from PIL import Image, ImageFilter

from ppdensecl.data import transforms
from ppdensecl.data.cache import prepare
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.sources import FolderSource, LmdbSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import draw_views
from ppdensecl.data.worker import settle

sys.path.insert(0, str(ROOT / "tools/align"))
from pillow_views import ENHANCE, pillow_hue  # noqa: E402

COUNT, BATCH, BATCHES = 192, 32, 6  # pictures; pairs in a batch; batches a round
PARTS = ("decode", "crop and resize", "brightness", "contrast", "saturation", "hue", "grey", "blur", "flip", "hand over")
WAYS = ("authors, JPEG", "ours, JPEG", "authors, cache", "ours, cache")
WORKERS = (0, 1, 2, 4)


def make_pictures(folder, given):
    """COUNT JPEGs of 500 x 375 or 375 x 500 pixels in folder/jpeg, and the cache made of them."""
    source = FolderSource(given) if given else SyntheticSource(COUNT, size=(375, 500))
    (folder / "jpeg").mkdir()
    for number, i in enumerate(np.linspace(0, len(source) - 1, COUNT).astype(int).tolist()):
        picture = source.picture(i)
        height, width = picture.shape[:2]
        size = (500, 375) if width >= height else (375, 500)
        factor = max(size[0] / width, size[1] / height)
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(picture, (round(width * factor), round(height * factor)), interpolation=method)
        picture = np.ascontiguousarray(picture[:size[1], :size[0], ::-1])
        cv2.imwrite(str(folder / f"jpeg/{number:03d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    prepare(FolderSource(folder / "jpeg"), folder / "cache.lmdb", short_side=256)


class Clock:
    """Seconds by part; a part within a part belongs to the outer one."""

    def __init__(self):
        self.seconds, self.inside = defaultdict(float), False

    def __call__(self, part, function, *args):
        if self.inside:
            return function(*args)
        self.inside, start = True, time.process_time()
        result = function(*args)
        self.seconds[part] += time.process_time() - start
        self.inside = False
        return result


def authors(source, clock):
    """Batches as a PyTorch DataLoader with torchvision's transforms makes them: float32 [N, 2, 3, h, w], normalised."""
    import torch

    torch.set_num_threads(1)
    augmentation = Augmentation()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def view(image, p):
        image = clock("crop and resize", lambda: image.crop((p.left, p.top, p.left + p.width, p.top + p.height)).resize(
            augmentation.size[::-1], Image.BILINEAR))
        for part, factor in p.jitter or ():
            image = clock(part, lambda: pillow_hue(image, factor) if part == "hue" else ENHANCE[part](image).enhance(factor))
        if p.gray:
            image = clock("grey", lambda: image.convert("L").convert("RGB"))
        if p.sigma is not None:
            image = clock("blur", image.filter, ImageFilter.GaussianBlur(p.sigma))
        if p.flip:
            image = clock("flip", image.transpose, Image.FLIP_LEFT_RIGHT)
        return clock("hand over", to_tensor, image)

    def to_tensor(image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    def batch(epoch, samples):
        pairs = []
        for i in samples:
            image = clock("decode", lambda: Image.open(io.BytesIO(source.read(i))).convert("RGB"))
            views = [view(image, p) for p in draw_views(augmentation, image.height, image.width, 0, epoch, i)]
            pairs.append(clock("hand over", torch.stack, views))
        return clock("hand over", torch.stack, pairs)

    return batch


def ours(source, clock):
    """What a worker of PairLoader does: uint8 [2, N, h, w, 3]; normalising is left to the device."""

    def timed(part, function):
        return lambda *args: clock(part, function, *args)

    source.picture = timed("decode", source.picture)
    transforms.resize = timed("crop and resize", transforms.resize)
    transforms.grayscale = timed("grey", transforms.grayscale)
    transforms.blur = timed("blur", transforms.blur)
    transforms.ADJUST.update({part: timed(part, function) for part, function in transforms.ADJUST.items()})
    settle()
    loader = PairLoader(source, Augmentation(), BATCH)
    out = np.empty(loader._shape, np.uint8)
    return lambda epoch, samples: loader.fill(out, epoch * len(loader), samples)


def child(way, folder):
    cv2.setNumThreads(0)
    whose, _, what = way.partition(", ")
    source = LmdbSource(folder / "cache.lmdb") if what == "cache" else FolderSource(folder / "jpeg")
    if whose == "workers":
        loader = PairLoader(source, Augmentation(), BATCH, workers=int(what))
        measure.serve(lambda: [None for _ in loader.batches(range(4 * BATCHES))] and None)
        return
    clock, epochs = Clock(), iter(range(10**6))
    batch = (ours if whose == "ours" else authors)(source, clock)

    def once():
        clock.seconds.clear()
        epoch, start = next(epochs), time.process_time()
        for first in range(0, COUNT, BATCH):
            batch(epoch, range(first, first + BATCH))
        total = time.process_time() - start
        return {"parts": {**clock.seconds, "rest": total - sum(clock.seconds.values())}}

    measure.serve(once)


def report(found, given):
    rates = {way: COUNT / measure.median(found[way], "cpu") for way in WAYS}
    # A ratio is the median over the rounds, of which each compares neighbours in time.
    ratio = {way: {of: measure.median([{"x": a["cpu"] / b["cpu"]} for a, b in zip(found[of], found[way])], "x")
                   for of in WAYS} for way in WAYS}
    parts = {way: {part: measure.median([{"x": answer["parts"].get(part, 0)} for answer in found[way]], "x") / COUNT * 1e3
                   for part in (*PARTS, "rest")} for way in WAYS}
    loading = {n: 4 * BATCHES * BATCH / measure.median(found[f"workers, {n}"]) for n in WORKERS}
    markdown = [
        f"Pairs of 224 x 224 views of {'the pictures in a folder' if given else 'procedural scenes'}, {COUNT} JPEGs of "
        "500 x 375, and of their cache with a short side of 256 (LMDB).\n",
        measure.table(["one core", "pairs/s", "times the authors' from JPEG", "times the authors' from the same files"],
                      [[way, rates[way], ratio[way][WAYS[0]], ratio[way]["authors, " + way.partition(", ")[2]]] for way in WAYS]),
        "", "Where the time goes, ms of CPU a pair:\n",
        measure.table(["part", *WAYS[:2], "ratio", *WAYS[2:], "ratio"],
                      [[part, *(x for a, b in (WAYS[:2], WAYS[2:]) for x in
                                (parts[a][part], parts[b][part], parts[a][part] / parts[b][part] if parts[b][part] else "–"))]
                       for part in (*PARTS, "rest")]),
        "", "PairLoader from JPEG, by the clock, the consumer idle:\n",
        measure.table(["workers", "pairs/s", "times no worker"], [[str(n), loading[n], loading[n] / loading[0]] for n in WORKERS])]

    def plot(figure):
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.5, 1))
        colours = {"authors": "tab:gray", "ours": "tab:blue"}
        bars = left.bar([way.replace(", ", ",\n") for way in WAYS], rates.values(), color=[colours[w.split(",")[0]] for w in WAYS])
        left.bar_label(bars, fmt="%.0f")
        left.set(ylabel="pairs / s on one core", ylim=(0, 1.12 * max(rates.values())))
        left.tick_params(axis="x", labelsize=7)
        place = np.arange(len(PARTS) + 1)
        for shift, way in ((-0.2, WAYS[0]), (0.2, WAYS[1])):
            middle.barh(place + shift, parts[way].values(), 0.4, label=way, color=colours[way.split(",")[0]])
        middle.set(xlabel="CPU ms a pair", yticks=place, yticklabels=[*PARTS, "rest"])
        middle.invert_yaxis()
        middle.legend(loc=(0.56, 0.28), fontsize=8)
        right.plot(WORKERS, loading.values(), "o-", color="tab:blue")
        right.set(xlabel="worker processes", ylabel="pairs / s of PairLoader, JPEG", ylim=0, xticks=WORKERS)
        right.grid(alpha=0.3)

    measure.write("data", {"pairs_per_second_and_core": rates, "ratio": ratio, "ms_per_pair": parts,
                           "pairs_per_second_by_workers": loading, "rounds": found}, "\n".join(markdown), plot)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", metavar="FOLDER", help="of pictures (default: procedural scenes)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        return child(arguments.way, arguments.made)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_pictures(folder, arguments.pictures)
        names = (*WAYS, *(f"workers, {n}" for n in WORKERS))
        found = measure.in_turn({way: ([sys.executable, __file__, "--way", way, "--made", folder],
                                       {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}) for way in names}, arguments.rounds)
    report(found, arguments.pictures)


if __name__ == "__main__":
    main()
