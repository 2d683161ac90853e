"""Writes what is known of a run into one HTML file that needs nothing else: python tools/report.py output/RUN

Pictures that are missing, or of another checkpoint than the latest, are drawn first; tools/visualize.py has options for them.
Scores are those of the files in RUN that tools/eval.py --out wrote."""

import sys
from pathlib import Path

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("run", help="the output_dir of a run")
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default RUN/report.html)")
    arguments = parser.parse_args()
    out = Path(arguments.out or Path(arguments.run) / "report.html")
    if arguments.out and not out.resolve().parent.is_dir():
        parser.error(f"--out {out}: there is no such folder")

    from ppdensecl.visual.report import write_report

    missing = write_report(arguments.run, out)
    if missing:
        print(f"note: the pictures could not be drawn: {missing}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line.run(main)
