"""Pre-trains DenseCL (or MoCo-v2): python tools/train.py -c configs/densecl_r18_photos.yaml -o data.root=/my/pictures"""

import os
import signal
import sys

import command_line

from ppdensecl.errors import UserError


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT",
                        help="go on from the newest whole checkpoint of output_dir (from the beginning where there is none yet), "
                             "or from the one given")
    parser.add_argument("--overwrite", action="store_true", help="delete the checkpoints of an earlier run in output_dir")
    parser.add_argument("--print-config", action="store_true", help="show the merged config and end")
    arguments = parser.parse_args()
    try:
        config = command_line.read_config(arguments)
    except UserError as error:
        if os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1" or arguments.print_config:
            raise
        from ppdensecl import parallel

        parallel.start()  # or the other ranks would wait for this one
        parallel.agree(None, error)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return
    from ppdensecl.engine.stopping import peers_watched
    from ppdensecl.engine.trainer import Trainer

    # Paddle's own handler prints a C++ traceback; `fit` has one that writes a checkpoint.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with peers_watched():
        stopped_by = Trainer(config, arguments.resume, arguments.overwrite).fit()
    if stopped_by:
        # The launcher sends SIGTERM to the other ranks when it sees the first one end: all are to end with the same status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    command_line.run(main)
