"""Draws what a run did, into RUN/pictures: python tools/visualize.py output/RUN"""

from pathlib import Path

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("run", help="the output_dir of a run")
    parser.add_argument("--checkpoint", default="latest", help="name in that folder (default %(default)s)")
    parser.add_argument("--matches", type=int, default=4, help="pictures whose dense matches are drawn (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.matches < 1:
        parser.error("--matches must be at least 1")
    run = Path(arguments.run)

    import cv2

    from ppdensecl.config import load_config
    from ppdensecl.data.loader import PairLoader
    from ppdensecl.data.transforms import Augmentation
    from ppdensecl.engine import device
    from ppdensecl.data.sources import spread
    from ppdensecl.engine.trainer import build_source
    from ppdensecl.errors import UserError
    from ppdensecl.evaluation.correspondence import matched_pair
    from ppdensecl.evaluation.features import load_backbone
    from ppdensecl.visual.curves import draw_curves, read_log
    from ppdensecl.visual.views import draw_matches, pair_sheet

    config = load_config(run / "config.yaml")
    device.select(config.device)
    source = build_source(config)
    pictures = run / "pictures"
    try:
        pictures.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{pictures}: cannot be made a folder ({error.strerror}); move what has that name") from None
    log = read_log(run / "train.log")
    draw_curves(log, config.model.queue_len, pictures / "curves.png")

    loader = PairLoader(source, Augmentation(size=config.data.size), min(12, len(source)), config.seed, max_bad_fraction=1)
    cv2.imwrite(str(pictures / "views.png"), pair_sheet(next(loader.batches([0])))[:, :, ::-1])

    backbone = load_backbone(run / arguments.checkpoint)
    larger = Augmentation(size=tuple(2 * side for side in config.data.size))  # more cells than in training
    for number, (index, picture) in enumerate(spread(source, arguments.matches)):
        drawn = draw_matches(*matched_pair(backbone, picture, larger, config.seed, index))
        cv2.imwrite(str(pictures / f"matches_{number}.png"), drawn[:, :, ::-1])
    print(f"{pictures}: curves.png, views.png, matches_*.png")


if __name__ == "__main__":
    command_line.run(main)
