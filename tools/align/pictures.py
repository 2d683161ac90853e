"""How far our augmentations are from those of Pillow and torchvision, on real or made pictures."""

import io

import compare
import numpy as np
import paddle
import reference
import torch
from PIL import Image, ImageFilter
from pillow_views import ENHANCE, exact_hue, pillow_hue, pillow_view, true_gaussian

from ppdensecl.data import transforms
from ppdensecl.data.picture import decode
from ppdensecl.data.sources import FolderSource
from ppdensecl.data.synthetic import SyntheticSource
from ppdensecl.data.transforms import Augmentation
from ppdensecl.models.densecl import normalise

CHECK = "pictures"
DTYPE = "uint8"
def open_pictures(folder, count=24):
    """`count` pictures from all over a folder, or procedural scenes where none is given: RGB uint8 arrays."""
    source = SyntheticSource(count, size=(300, 400)) if folder is None else FolderSource(folder)
    return [source.picture(i) for i in range(0, len(source), max(1, len(source) // count))][:count]


def rows(pictures):
    """pictures: RGB uint8 arrays. A row for each transform; its tolerance is what the reference's own 8 bits cost."""
    found = {}

    def add(name, ours, theirs, tolerance, why):
        found.setdefault((name, tolerance, why), []).append((np.asarray(ours, "float64"), np.asarray(theirs, "float64")))

    draw = np.random.default_rng(0)
    for picture in pictures:
        image = Image.fromarray(picture)
        for fmt in ("JPEG", "PNG"):
            file = io.BytesIO()
            image.save(file, fmt)
            add(f"decode {fmt}", decode(file.getvalue(), "picture"), np.asarray(Image.open(file).convert("RGB")), 0,
                "the same bits")
        small = transforms.resize(picture, (224, 224))
        add("resize to 224", small, image.resize((224, 224), Image.BILINEAR), 2,
            "columns, then rows: sums that are halves may round either way")
        image = Image.fromarray(small)
        for part in ("brightness", "contrast", "saturation"):
            factor = draw.uniform(0.6, 1.4)
            exact = part != "saturation"
            add(part, transforms.ADJUST[part](small, factor), ENHANCE[part](image).enhance(factor), 0 if exact else 1,
                "the same bits" if exact else "one level of rounding")
        turns = draw.uniform(-0.1, 0.1)
        ours, theirs, exact = transforms.adjust_hue(small, turns), np.asarray(pillow_hue(image, turns)), exact_hue(small, turns)
        add("hue, against float64", ours, exact, 0.51, "half a level: rounding to 8 bits")
        add("hue, against Pillow", ours, theirs, 14, "Pillow's HSV has 8 bits: 2/255 of a turn are 12 levels at full chroma")
        add("hue, Pillow against float64", theirs, exact, 14, "for comparison")
        add("grayscale", transforms.grayscale(small), image.convert("L").convert("RGB"), 1, "one level of rounding")
        sigma = draw.uniform(0.1, 2.0)
        ours, theirs = transforms.blur(small, sigma), np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))
        exact = true_gaussian(small, sigma)
        add("blur, against float64", ours, exact, 1.51, "rounding to 8 bits, and the tail beyond 3σ")
        add("blur, Pillow against float64", theirs, exact, 255, "for comparison: three boxes are not a Gaussian")
        bound = float(np.abs(theirs - exact).max())
        add("blur, against Pillow, beyond what Pillow is off", np.maximum(np.abs(ours - theirs.astype("float64")) - bound, 0),
            np.zeros(ours.shape), 1.51, "the accepted substitution")
        augmentation = Augmentation()
        for _ in range(3):
            p = augmentation.draw(draw, *picture.shape[:2])
            ours, theirs = augmentation.apply(picture, p), pillow_view(picture, p, augmentation.size)
            mean = np.abs(ours.astype(float) - theirs).mean()
            add("whole view, mean of |difference|", [mean], [0], 3, "Pillow's hue is cut off to 8 bits, its blur is boxes")
            if p.sigma is None and not any(part == "hue" for part, _ in p.jitter or ()):
                add("whole view without hue and blur", ours, theirs, 7 if p.jitter else 2,
                    "the two levels of the resize, times up to 1.4 by brightness, contrast and saturation each")
    result = []
    for (name, tolerance, why), pairs in found.items():
        members = [compare.row(CHECK, f"augmentation/{name}", DTYPE, *pair, tolerance, why=why) for pair in pairs]
        worst = max(members, key=lambda r: r.largest)
        worst.mean = float(np.mean([r.mean for r in members]))
        result.append(worst)
    return result + _normalisation(np.stack([transforms.resize(p, (64, 64)) for p in pictures]))


def _normalisation(views):
    found = []
    for dtype in ("float32", "float64"):
        paddle.set_default_dtype(dtype)
        ours = normalise(paddle.to_tensor(views)).numpy()
        paddle.set_default_dtype("float32")
        theirs = reference.normalise(torch.tensor(views), getattr(torch, dtype)).numpy()
        exact = reference.normalise(torch.tensor(views), torch.float64).numpy()
        noise = max(float(np.abs(theirs - exact).max()), float(np.finfo(dtype).eps))
        found.append(compare.row(CHECK, "data/normalised views", dtype, ours, theirs, compare.FACTOR * noise, noise))
    return found
