"""Draws what a run did and what it learned, into RUN/pictures: python tools/visualize.py output/RUN"""

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("run", help="the output_dir of a run")
    parser.add_argument("--checkpoint", default="latest", help="name in that folder (default %(default)s)")
    parser.add_argument("--matches", type=int, default=4, metavar="N",
                        help="pictures whose matches and similarities are drawn (default %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9,
                        help="cosine above which mutual matches are drawn (default %(default)s)")
    parser.add_argument("--cell", type=int, nargs=2, metavar=("ROW", "COLUMN"),
                        help="of the query view, from 0, whose similarities are drawn (default: one with contrast)")
    parser.add_argument("--count", type=int, default=100, help="pictures among which views are searched (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.matches < 1:
        parser.error("--matches must be at least 1")
    if not -1 <= arguments.threshold <= 1:
        parser.error("--threshold is a cosine: from -1 to 1")
    if arguments.count < 2:
        parser.error("--count must be at least 2")

    from ppdensecl.visual.pictures import draw_run

    folder = draw_run(arguments.run, arguments.checkpoint, arguments.matches, arguments.threshold, arguments.cell,
                      arguments.count)
    print(f"{folder}: curves.png, views.png, pca.png, retrieval.png, matches_*.png, mutual_*.png, similarity_*.png")


if __name__ == "__main__":
    command_line.run(main)
