"""Scores a frozen backbone beside a random one:
python tools/eval.py -c output/RUN/config.yaml --checkpoint output/RUN/latest --task retrieval"""

import json
from pathlib import Path

import command_line


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="path without suffix, or a .pdparams (also an extracted backbone)")
    parser.add_argument("--task", required=True, choices=["knn", "retrieval", "correspondence"],
                        help="knn: class of objects of the synthetic scenes; retrieval: the other view of a picture; "
                        "correspondence: dense matches within one cell of the truth")
    parser.add_argument("--count", type=int, default=400, help="pictures (default %(default)s)")
    parser.add_argument("--out", help="also write the result as JSON to this file")
    arguments = parser.parse_args()
    config = command_line.read_config(arguments)
    if arguments.count < 2:
        parser.error("--count must be at least 2")
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no such folder")
    from ppdensecl.engine import device
    from ppdensecl.engine.trainer import build_source
    from ppdensecl.evaluation import features
    from ppdensecl.evaluation.tasks import TASKS

    device.select(config.device)
    source = build_source(config)
    trained = features.load_backbone(arguments.checkpoint)
    fresh = features.random_backbone(trained.depth, len(trained.feat_channels), config.seed)
    backbones = {"trained": trained, "random": fresh}
    result = {"task": arguments.task, "checkpoint": arguments.checkpoint, "count": arguments.count, "seed": config.seed}
    for name, backbone in backbones.items():
        scores = TASKS[arguments.task](backbone, source, config.data, config.seed, arguments.count)
        result[name], result["chance"] = scores["accuracy"], scores["chance"]
    print(f"{arguments.task}: trained {100 * result['trained']:.1f} %, random start {100 * result['random']:.1f} %, "
          f"chance {100 * result['chance']:.1f} %")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
