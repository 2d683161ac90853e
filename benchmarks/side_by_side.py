"""Segmentations of the same pictures by several networks, side by side:
python benchmarks/side_by_side.py --list camvid/test.txt --classes camvid/labels.txt --out masks.png random=masks/r DenseCL=masks/d

Each NAME=DIR holds the masks that tools/finetune_seg.py predict wrote for the listed pictures. Written above each mask: its
pixels that are right, of those that have a label. The pictures are spread evenly over the list, not chosen.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

PALETTE = np.array([[135, 206, 235], [178, 102, 102], [230, 200, 60], [110, 80, 140], [240, 110, 200], [70, 140, 60],
                    [250, 130, 20], [150, 110, 80], [40, 70, 200], [220, 30, 40], [30, 180, 170]] + [[90, 90, 90]] * 245, np.uint8)
PALETTE[255] = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, required=True, help="lines `image label-map`, relative to the list's folder")
    parser.add_argument("--classes", type=Path, required=True, help="a class's name per line")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--out", required=True)
    parser.add_argument("masks", nargs="+", metavar="NAME=DIR")
    arguments = parser.parse_args()
    lines, names = arguments.list.read_text().splitlines(), arguments.classes.read_text().splitlines()
    if len(names) > 11:
        sys.exit(f"error: {arguments.classes}: has {len(names)} classes; there are colours for CamVid's 11")
    chosen = [lines[i].split() for i in np.linspace(0, len(lines) - 1, arguments.count).astype(int)]
    networks = [text.partition("=")[::2] for text in arguments.masks]
    columns = 2 + len(networks)
    figure = Figure(figsize=(2.6 * columns, 2.15 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, (picture, label) in zip(axes, chosen):
        truth = np.array(Image.open(arguments.list.parent / label))
        shown = [("picture", np.array(Image.open(arguments.list.parent / picture))), ("label (black: none)", PALETTE[truth])]
        for name, folder in networks:
            path = Path(folder) / f"{Path(picture).stem}.png"
            if not path.exists():
                sys.exit(f"error: {path}: there is no such mask; write it with tools/finetune_seg.py predict")
            mask = np.array(Image.open(path))
            shown.append((f"{name}: {100 * (mask == truth)[truth != 255].mean():.0f} % right", PALETTE[mask]))
        for axis, (title, image) in zip(row, shown):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.legend(handles=[Patch(color=PALETTE[i] / 255, label=name) for i, name in enumerate(names)], loc="outside lower center",
                  ncols=len(names), fontsize=8, handlelength=1, columnspacing=1)
    figure.savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
