"""Finds pictures, and places in pictures, that look like a given one; no labels are needed.

python tools/similar.py output/index --pictures PICTURES --checkpoint output/RUN/latest --size 224     makes the index
python tools/similar.py output/index QUERY.jpg --at 320 200 --out similar.png                          asks it

The sheet's first row has the most similar pictures as a whole, the second the places most like the one at x y.
"""

import argparse
import sys

import command_line

from ppdensecl.errors import UserError


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("index", metavar="INDEX_DIR")
    parser.add_argument("query", metavar="QUERY", nargs="?", help="a picture")
    group = parser.add_argument_group("to make the index")
    group.add_argument("--pictures", metavar="DIR", help="searched at any depth")
    group.add_argument("--checkpoint", help="path without suffix, or a .pdparams (also an extracted backbone)")
    group.add_argument("--size", type=int, nargs="+", default=[224], help="pixels of the view, one or two: height, width (default 224)")
    group.add_argument("--stage", type=int, choices=[1, 2, 3, 4], help="of the backbone (default: the last)")
    group = parser.add_argument_group("to ask it")
    group.add_argument("--at", type=int, nargs=2, metavar=("X", "Y"), help="the place, in pixels of QUERY (default: its middle)")
    group.add_argument("--count", type=int, default=6, help="of results in a row (default 6)")
    group.add_argument("--out", default="similar.png", help="the sheet (default %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    arguments = parser.parse_args()
    if bool(arguments.pictures) != bool(arguments.checkpoint):
        parser.error("--pictures and --checkpoint belong together")
    if not arguments.pictures and not arguments.query:
        parser.error("give a QUERY, or --pictures and --checkpoint to make the index")
    if arguments.count < 1 or len(arguments.size) > 2 or min(arguments.size) < 32:
        parser.error("--count must be at least 1, and --size one or two numbers from 32")
    from ppdensecl.engine import device
    from ppdensecl.evaluation import features, similar

    device.select(arguments.device)
    if arguments.pictures:
        size = tuple((arguments.size * 2)[:2])
        backbone = features.load_backbone(arguments.checkpoint)
        count, bad = similar.build(arguments.index, arguments.pictures, backbone, size, arguments.stage)
        for error in bad:
            print(f"left out: {error}", file=sys.stderr)
        print(f"{arguments.index}: {count} pictures" + (f", {len(bad)} left out" if bad else ""))
    if not arguments.query:
        return
    from ppdensecl.data.picture import UndecodableError, decode
    from ppdensecl.visual.found import draw_found

    try:
        with open(arguments.query, "rb") as file:
            picture = decode(file.read(), arguments.query)
    except OSError as error:
        raise UserError(f"{arguments.query}: cannot be read ({error.strerror}); give a picture") from None
    except UndecodableError as error:
        raise UserError(f"{error}; give another picture") from None
    index = similar.Index(arguments.index)
    place = arguments.at or (picture.shape[1] // 2, picture.shape[0] // 2)
    cell = index.cell_of(picture, place)
    whole, places = index.like_picture(picture, arguments.count), index.like_place(picture, cell, arguments.count)
    for number, cosine in whole:
        print(f"picture {index.pictures.shown(number)}: {cosine:.3f}")
    for number, (row, column), cosine in places:
        print(f"place   {index.pictures.shown(number)} row {row}, column {column}: {cosine:.3f}")
    draw_found(picture, cell, whole, places, index.pictures, index.maps.shape[2:], arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    command_line.run(main)
