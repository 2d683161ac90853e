"""Copies pictures into one LMDB file, reduced in size where wanted; -o data.source=lmdb data.root=OUTPUT then reads it.

python tools/prepare_data.py --root PICTURES --output cache.lmdb                     bytes unchanged
python tools/prepare_data.py --root PICTURES --output cache.lmdb --short-side 256    larger pictures reduced, as JPEG

Interrupted or killed, the same command goes on where it was. See docs/data.md.
"""

import argparse
import os
import signal
import sys

import command_line

from ppdensecl.errors import UserError


def main():
    received = []

    def stop(number, _):
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # it ends within seconds
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    try:
        prepare(parse())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(128 + received[0])


def parse():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", choices=["folder", "list", "coco", "lmdb", "archive"], default="folder",
                        help="as data.source of a config (default: folder)")
    parser.add_argument("--root", help="folder, LMDB or archive, as data.root")
    parser.add_argument("--list-file", help="of source list: a text file with a path per line")
    parser.add_argument("--annotation", help="of source coco: the json that lists the pictures")
    parser.add_argument("--output", required=True, help="LMDB file to make, e.g. cache.lmdb")
    parser.add_argument("--short-side", type=int, default=0, metavar="PIXELS",
                        help="reduce pictures with a longer short side to this (default: 0, none)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs of reduced pictures (default: 95)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01,
                        help="of pictures that cannot be decoded and are left out (default: 0.01)")
    arguments = parser.parse_args()
    for option, kind in (("list_file", "list"), ("annotation", "coco")):
        if getattr(arguments, option) is not None and arguments.source != kind:
            parser.error(f"--{option.replace('_', '-')} belongs to --source {kind}, not {arguments.source}")
    return arguments


def prepare(arguments):
    from ppdensecl.data import cache, sources

    try:
        source = sources.open_source(arguments.source, root=arguments.root, list_file=arguments.list_file,
                                     annotation=arguments.annotation)
    except UserError as error:  # which names keys of a config
        text = str(error)
        for key, option in (("data.root", "--root"), ("data.list_file", "--list-file"), ("data.annotation", "--annotation")):
            text = text.replace(f"{key}:", f"{option}:").replace(f"{key} ", f"{option} ")
        raise UserError(text) from None
    done = cache.prepare(source, arguments.output, arguments.short_side, arguments.quality, arguments.workers,
                         arguments.max_bad_fraction, progress=True)
    if done.bad:
        names = ", ".join(name for name, _ in done.bad[:10]) + (", …" if len(done.bad) > 10 else "")
        print(f"{len(done.bad)} pictures cannot be decoded and were left out: {names} (reasons in {arguments.output}.bad.txt)")
    there = f" ({done.resumed} were there before)" if done.resumed else ""
    print(f"{arguments.output}: {done.pictures} pictures{there}, {done.reduced} reduced, {done.bytes_before / 1e9:.3f} GB -> "
          f"{done.bytes_after / 1e9:.3f} GB, {done.seconds:.1f} s")


if __name__ == "__main__":
    command_line.run(main)
