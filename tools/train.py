"""Pre-trains DenseCL (or MoCo-v2): python tools/train.py -c configs/densecl_r18_photos.yaml -o data.root=/my/pictures"""

import os
import shlex
import signal
import sys

import command_line

from ppdensecl.errors import UserError
from ppdensecl.machine import cores


FEWEST = 16  # pictures that a process's BatchNorm should see


def share(config, processes):
    """On a CPU, becomes Paddle's launcher of one process per core: many of Paddle's CPU operators run on one thread."""
    if "PADDLE_TRAINERS_NUM" in os.environ:
        return
    batch = config.data.batch_size
    if processes is None:
        on_cpu = config.device == "cpu" or (config.device == "auto" and not command_line.gpu_build())
        alone = not on_cpu or config.model.bn_groups > 1 or "PPDENSECL_CPU_THREADS" in os.environ
        processes = 1 if alone else max(n for n in range(1, cores() + 1) if n == 1 or (batch % n == 0 and batch // n >= FEWEST))
    if processes < 1 or batch % processes:
        raise UserError(f"--processes is {processes}, which is no divisor of data.batch_size {batch}; use one")
    if processes == 1:
        return
    print(f"note: {processes} processes, each with {batch // processes} of a batch's {batch} pictures (which is what BatchNorm sees, "
          "as on so many cards); --processes 1 for a single one", file=sys.stderr, flush=True)
    command_line.launch(processes, os.path.join(config.output_dir, "log"),
                        ["-o", f"data.batch_size={batch // processes}", "device=cpu"])


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT",
                        help="go on from the newest whole checkpoint of output_dir (from the beginning where there is none yet), "
                             "or from the one given")
    parser.add_argument("--overwrite", action="store_true", help="delete the checkpoints of an earlier run in output_dir")
    parser.add_argument("--print-config", action="store_true", help="show the merged config and end")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="share the batch among N processes on this machine's CPU (default: one per core, while each has "
                             f"{FEWEST} pictures); GPUs and several machines: paddle.distributed.launch")
    arguments = parser.parse_args()
    try:
        config = command_line.read_config(arguments)
    except UserError as error:
        if os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1" or arguments.print_config:
            raise
        from ppdensecl import parallel

        parallel.start()  # or the other ranks would wait for this one
        parallel.agree(error=error)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return
    share(config, arguments.processes)
    from ppdensecl.engine.logging import LOGGER
    from ppdensecl.engine.stopping import peers_watched
    from ppdensecl.engine.trainer import Trainer

    # Paddle's own handler prints a C++ traceback; `fit` has one that writes a checkpoint.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with peers_watched():
        trainer = Trainer(config, arguments.resume, arguments.overwrite)
        LOGGER.info(f"command: {shlex.join(sys.argv)}")
        stopped_by = trainer.fit()
    if stopped_by:
        # The launcher sends SIGTERM to the other ranks when it sees the first one end: all are to end with the same status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    command_line.run(main)
