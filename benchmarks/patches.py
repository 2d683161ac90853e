"""Class folders from a segmentation data set: python benchmarks/patches.py LIST OUTPUT [--root DIR] [--side 96] [--count 60]

LIST has lines `image label`, as PaddleSeg's. A patch belongs to a class that has 60 % or more of its pixels; of each class that
has enough, COUNT patches from pictures in an order fixed by the seed, at most two of a picture, are written as
OUTPUT/CLASS/picture_row_column.png. For the probes of tools/eval.py on real pictures.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

SHARE, OF_A_PICTURE = 0.6, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, help="of the listed paths (default: the list's folder)")
    parser.add_argument("--classes", nargs="+", required=True, metavar="NUMBER=NAME", help="e.g. 0=sky 1=building 8=car")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--count", type=int, default=60)
    arguments = parser.parse_args()
    names = {int(number): name for number, _, name in (item.partition("=") for item in arguments.classes)}
    for path in [arguments.output / name for name in names.values()]:
        path.mkdir(parents=True)
    left = dict.fromkeys(names, arguments.count)
    lines, rng = arguments.list.read_text().splitlines(), np.random.default_rng(0)
    for line in rng.permutation(lines):
        picture, labels = (cv2.imread(str((arguments.root or arguments.list.parent) / path), flag)
                           for path, flag in zip(line.split(), (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE)))
        corners = [(y, x) for y in range(0, labels.shape[0] - arguments.side + 1, arguments.side // 2)
                   for x in range(0, labels.shape[1] - arguments.side + 1, arguments.side // 2)]
        taken = dict.fromkeys(names, OF_A_PICTURE)
        for y, x in rng.permutation(corners):
            window = np.s_[y:y + arguments.side, x:x + arguments.side]
            pixels = np.bincount(labels[window].ravel(), minlength=256)
            number = int(pixels.argmax())
            if left.get(number) and taken[number] and pixels[number] >= SHARE * arguments.side**2:
                left[number], taken[number] = left[number] - 1, taken[number] - 1
                cv2.imwrite(str(arguments.output / names[number] / f"{Path(line.split()[0]).stem}_{y}_{x}.png"), picture[window])
    for number, name in names.items():
        print(f"{name}: {arguments.count - left[number]} patches")


if __name__ == "__main__":
    main()
