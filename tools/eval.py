"""Scores a frozen backbone beside a random one:
python tools/eval.py -c output/RUN/config.yaml --checkpoint output/RUN/latest --task retrieval
python tools/eval.py -c configs/densecl_r50.yaml --checkpoint backbone.pdparams --protocol configs/probes/linear_imagenet.yaml
Of the config count data.image_size, seed, device, and data.source where no labelled pictures are given; see docs/probes.md."""

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

import command_line

from ppdensecl.errors import UserError

TASKS = {"knn": "class by nearest neighbours: of --train-dir/--test-dir pictures, or of objects of the synthetic scenes",
         "retrieval": "the other view of a picture", "correspondence": "dense matches within one cell of the truth",
         "linear": "a linear layer on pooled features", "svm": "linear SVMs, on VOC2007 or class folders, also low-shot; needs scikit-learn",
         "semi": "fine-tuning on 1 %% and 10 %% of the labels", "dense": "a 1x1 convolution on feature maps segments pictures"}


def read_arguments():
    parser = command_line.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="path without suffix, or a .pdparams (also an extracted backbone)")
    parser.add_argument("--protocol", metavar="FILE",
                        help="YAML file of a task and its options, see configs/probes/; those on the command line count more")
    parser.add_argument("--task", choices=TASKS, help="; ".join(f"{name}: {what}" for name, what in TASKS.items()))
    parser.add_argument("--out", help="also write the result as JSON to this file")
    parser.add_argument("--count", type=int, help="pictures or scenes where none are listed (default 400)")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="share the extraction of features among N processes on this machine's CPU; GPUs: "
                             "paddle.distributed.launch")
    parser.add_argument("--no-random", action="store_true", help="do not score a random start beside it")
    data = parser.add_argument_group("labelled pictures")
    data.add_argument("--train-dir", metavar="DIR", help="a folder of pictures for each class")
    data.add_argument("--test-dir", metavar="DIR", help="the same, for the score")
    data.add_argument("--train-list", metavar="FILE", help="lines `path label`; for dense `image label-map`")
    data.add_argument("--test-list", metavar="FILE")
    data.add_argument("--root", metavar="DIR", help="what listed paths are relative to (default: the list's folder)")
    data.add_argument("--voc07", metavar="DIR", help="svm: VOCdevkit/VOC2007")
    data.add_argument("--shuffle-labels", action="store_true", default=None, help="the control (also of places and of pairs of views): the scores must be chance")
    probe = parser.add_argument_group("features and probes")
    probe.add_argument("--size", type=int, nargs="+", help="pixels, one or height and width (default data.image_size)")
    probe.add_argument("--stage", type=int, nargs="+", help="of the backbone, from 1 (default: the last); dense: one or several")
    probe.add_argument("--cache", metavar="DIR", help="where features are kept (default output/features)")
    probe.add_argument("--neighbours", type=int, nargs="+", help="knn (default 10 20 100 200; 20 is the score)")
    probe.add_argument("--temperature", type=float, help="knn (default 0.07)")
    probe.add_argument("--lr", type=float, nargs="+",
                       help="linear 30 (of several the best on a held-out tenth), semi 0.01, dense 0.1")
    probe.add_argument("--epochs", type=int, help="linear 100, semi and dense 20")
    probe.add_argument("--batch-size", type=int, help="linear 256, semi 64, dense 16")
    probe.add_argument("--augment", action="store_true", default=None, help="linear: new random crops in each epoch, the recipe")
    probe.add_argument("--costs", type=float, nargs="+", help="svm: to choose from by cross-validation")
    probe.add_argument("--low-shot", type=int, nargs="*", help="svm: positives per class (default 1 2 4 8 16 32 64 96)")
    probe.add_argument("--low-shot-costs", type=float, nargs="+", help="svm (default 0.01 0.1 1 10 100)")
    probe.add_argument("--samples", type=int, help="svm: draws for each low-shot number (default 5)")
    probe.add_argument("--fraction", type=float, nargs="+", help="semi: shares of the labels (default 0.01 0.1)")
    probe.add_argument("--head-lr-multiplier", type=float, help="semi (default 10)")
    probe.add_argument("--classes", type=int, help="dense (default: the highest training label + 1)")
    probe.add_argument("--split", metavar="FILE", help="semi: a text file that lists the training pictures, in place of shares")
    arguments = parser.parse_args()
    if arguments.protocol:
        arguments = parser.parse_args([*_protocol(arguments.protocol), *sys.argv[1:]])
    if arguments.task is None:
        parser.error("--task or --protocol is needed")
    if arguments.processes is not None and arguments.processes < 1:
        parser.error("--processes must be at least 1")
    if arguments.count is not None and arguments.count < 2:
        parser.error("--count must be at least 2")
    if arguments.out:
        _check_out(arguments.out)
    return arguments


def _check_out(path):
    """Refuses at the start what would take a score, maybe of days, at the end."""
    out = Path(path)
    if not os.path.isdir(out.parent):
        raise UserError(f"--out {path}: there is no folder {out.parent}; make it, or give another file")
    if os.path.exists(out) and not os.path.isfile(out):
        kind = "a folder" if os.path.isdir(out) else "no regular file"
        raise UserError(f"--out {path}: is {kind}; give the name of a file to write")
    trial = out.with_name(f".{out.name}.tmp{os.getpid()}")  # as the result's own temporary file
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"--out {path}: no file can be made there ({error.strerror}); give another one") from None


def _protocol(path):
    """The options of a protocol's file as on a command line."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--protocol {path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"--protocol {path}: expected lines `option: value`, such as `task: linear`")
    words = []
    for option, value in found.items():
        words += [] if value in (None, False) else [f"--{option}".replace("_", "-")]
        words += [] if value in (None, False, True) else [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def main():
    arguments = read_arguments()
    config = command_line.read_config(arguments)
    if (arguments.processes or 1) > 1 and "PADDLE_TRAINERS_NUM" not in os.environ:
        command_line.launch(arguments.processes, os.path.join(arguments.cache or "output/features", "log"), ["-o", "device=cpu"])
    from ppdensecl import parallel
    from ppdensecl.engine import checkpoint, device
    from ppdensecl.evaluation import features, tasks

    started = time.monotonic()
    options = tasks.resolve(arguments.task, {option: getattr(arguments, option) for option in tasks.OPTIONS})
    device.select(config.device)
    parallel.start()
    look, score = tasks.TASKS[arguments.task](options, config)
    trained = features.load_backbone(arguments.checkpoint)
    seen = {"trained": look(trained)}
    if not arguments.no_random:
        seen["random"] = look(features.random_backbone(trained.depth, len(trained.feat_channels), config.seed))
    if not parallel.is_main():
        return
    result = {"task": arguments.task, "checkpoint": arguments.checkpoint, "seed": config.seed, "options": vars(options),
              "details": {}, "command": shlex.join(sys.argv), "config": config.model_dump(),
              "checkpoint_sha256": checkpoint.sha256_of(features.weights_file(arguments.checkpoint)),
              "environment": tasks.environment()}
    for name, found in seen.items():
        try:
            scores = result["details"][name] = score(found)
        except UserError as error:
            if name == "trained":
                raise
            print(f"note: the random start has no score: {error}", file=sys.stderr)
        else:
            result[name], result["chance"] = scores["accuracy"], scores["chance"]
            result["seconds"] = round(time.monotonic() - started, 1)
        # After each, for either may take days. Neither a full disk nor a closed terminal may take the other's copy.
        with contextlib.suppress(OSError):
            if name == list(seen)[-1]:
                print("\n".join(_lines(result)), flush=True)
            else:
                print("so far:", "; ".join(line.strip() for line in _lines(result)), file=sys.stderr)
        if arguments.out:
            checkpoint.write_text(arguments.out, json.dumps(result, indent=1, ensure_ascii=False))


def _lines(result):
    details = result["details"]
    yield _line(result["task"], result["trained"], result.get("random")) + f", chance {100 * result['chance']:.1f} %"
    for name, share in details["trained"].get("shown", {}).items():
        yield _line(f"  {name}", share, details["random"]["shown"][name] if "random" in details else None)


def _line(name, trained, random):
    return f"{name}: trained {100 * trained:.1f} %" + ("" if random is None else f", random start {100 * random:.1f} %")


if __name__ == "__main__":
    command_line.run(main)
