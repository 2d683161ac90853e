"""Prepares pictures: a cache for pre-training, or an official data set for the fine-tuning configs. See docs/data.md.

python tools/prepare_data.py lmdb --root PICTURES --output cache.lmdb                     bytes unchanged
python tools/prepare_data.py lmdb --root PICTURES --output cache.lmdb --short-side 256    larger pictures reduced, as JPEG
python tools/prepare_data.py voc --root data/VOCdevkit [--sbd benchmark_RELEASE]          boxes as COCO json, list of train_aug
python tools/prepare_data.py coco --root data/coco --fraction 0.1                         a tenth of the training pictures
python tools/prepare_data.py cityscapes --root data/cityscapes                            labels of the 19 classes
python tools/prepare_data.py synthetic --output data/scenes                               boxes, masks, labels: to try fine-tuning

Nothing is downloaded; what is missing is named. Interrupted or killed, the same command goes on where it was (synthetic begins anew).
"""

import argparse
import signal
import sys

import command_line

from ppdensecl.errors import UserError
from ppdensecl.machine import cores


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
        arguments = parse()
        {"lmdb": cache, "voc": voc, "coco": coco, "cityscapes": cityscapes, "synthetic": synthetic}[arguments.kind](arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(128 + received[0])


def parse():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{lmdb,voc,coco,cityscapes,synthetic}")

    def kind(name, description):
        return kinds.add_parser(name, help=description, description=description, allow_abbrev=False)

    def add_workers(part):
        part.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")

    part = kind("lmdb", "copy pictures into one LMDB file, reduced in size where wanted")
    part.add_argument("--source", choices=["folder", "list", "coco", "lmdb", "archive"], default="folder",
                      help="as data.source of a config (default: folder)")
    part.add_argument("--root", help="folder, LMDB or archive, as data.root")
    part.add_argument("--list-file", help="of source list: a text file with a path per line")
    part.add_argument("--annotation", help="of source coco: the json that lists the pictures")
    part.add_argument("--output", required=True, help="LMDB file to make, e.g. cache.lmdb")
    part.add_argument("--short-side", type=int, default=0, metavar="PIXELS",
                      help="reduce pictures with a longer short side to this (default: 0, none)")
    part.add_argument("--quality", type=int, default=95, help="of the JPEGs of reduced pictures (default: 95)")
    add_workers(part)
    part.add_argument("--max-bad-fraction", type=float, default=0.01,
                      help="of pictures that cannot be decoded and are left out (default: 0.01)")
    part = kind("voc", "PASCAL VOC 2007 and 2012: boxes as COCO json, labels and lists for train_aug")
    part.add_argument("--root", required=True, help="VOCdevkit, the folder of VOC2007 and VOC2012")
    part.add_argument("--task", choices=["detection", "segmentation"], help="only this one (default: both)")
    part.add_argument("--output", help="folder in which to make annotations/*.json (default: as --root)")
    part.add_argument("--sbd", metavar="DIR", help="benchmark_RELEASE of SBD, to make SegmentationClassAug of it")
    add_workers(part)
    part = kind("coco", "COCO 2017: a fixed random part of the training pictures")
    part.add_argument("--root", required=True, help="the folder of train2017, val2017 and annotations")
    part.add_argument("--fraction", type=float, default=0.1, help="of the training pictures (default: 0.1)")
    part.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    part = kind("cityscapes", "Cityscapes: labels of the 19 classes")
    part.add_argument("--root", required=True, help="the folder of leftImg8bit and gtFine")
    add_workers(part)
    part = kind("synthetic", "procedural scenes as COCO json and as PaddleSeg's lists, to try fine-tuning without data")
    part.add_argument("--output", required=True, help="folder to make")
    part.add_argument("--train", type=int, default=200, help="scenes to train on (default: 200)")
    part.add_argument("--test", type=int, default=50, help="scenes to test on (default: 50)")
    part.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="pixels (default: 192 256)")
    part.add_argument("--seed", type=int, default=0, help="of the scenes to train on; those to test on have the next one")
    arguments = parser.parse_args()
    if arguments.kind == "lmdb":
        for option, source in (("list_file", "list"), ("annotation", "coco")):
            if getattr(arguments, option) is not None and arguments.source != source:
                parser.error(f"--{option.replace('_', '-')} belongs to --source {source}, not {arguments.source}")
    elif arguments.kind == "synthetic":
        if min(arguments.train, arguments.test, min(arguments.size) - 31) < 1 or arguments.seed < 0:
            parser.error("--train and --test should be at least 1, --size at least 32, --seed at least 0")
    elif arguments.kind != "coco" and arguments.workers < 1:
        parser.error("--workers should be at least 1")
    return arguments


def cache(arguments):
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


def voc(arguments):
    from ppdensecl.interop import official_voc

    if arguments.task != "segmentation":
        say(official_voc.detection(arguments.root, arguments.output))
    if arguments.task != "detection":
        say(official_voc.segmentation(arguments.root, arguments.sbd, arguments.workers))


def coco(arguments):
    from ppdensecl.interop import official_data

    say(official_data.coco(arguments.root, arguments.fraction, arguments.seed))


def cityscapes(arguments):
    from ppdensecl.interop import official_data

    say(official_data.cityscapes(arguments.root, arguments.workers))


def synthetic(arguments):
    from ppdensecl.data import labelled_scenes
    from ppdensecl.data.synthetic import SyntheticSource

    for part, count, seed in (("train", arguments.train, arguments.seed), ("test", arguments.test, arguments.seed + 1)):
        labelled_scenes.write(SyntheticSource(count, seed, tuple(arguments.size)), arguments.output, part)
        print(f"{arguments.output}/{part}.json, {part}.txt: {count} scenes")


def say(sentences):
    for sentence in sentences:
        print(sentence, flush=True)


if __name__ == "__main__":
    command_line.run(main)
