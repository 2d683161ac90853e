"""What all tools share: the environment that Paddle needs before its import, -c/-o, and errors as one sentence."""

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, installed or not

from ppdensecl.errors import UserError  # noqa: E402 (imports no paddle)


def _prepare_environment():
    """All of this must happen before paddle (and numpy) are imported."""
    if "AuthenticAMD" in _cpu_info() and "MKL_DEBUG_CPU_TYPE" not in os.environ:
        # Paddle's MKL takes its slow path on AMD processors unless told otherwise; this doubles the speed.
        os.environ["MKL_DEBUG_CPU_TYPE"] = "5"
        print("note: AMD processor, MKL_DEBUG_CPU_TYPE=5 set for this process", file=sys.stderr)
    if "OMP_NUM_THREADS" in os.environ:  # Paddle would print a warning; ppdensecl.engine.device sets the threads
        os.environ.setdefault("PPDENSECL_CPU_THREADS", os.environ.pop("OMP_NUM_THREADS"))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy works in the data workers, one process per core
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")
    warnings.filterwarnings("ignore", message="No ccache found")


def _cpu_info():
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def parser(description, config=True):
    """An ArgumentParser; with `config` it has -c and -o."""
    arguments = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if config:
        arguments.add_argument("-c", "--config", required=True, help="YAML file, see configs/")
        arguments.add_argument("-o", "--override", nargs="+", action="append", default=[], metavar="KEY=VALUE",
                               help="set values of the config, e.g. -o data.root=/pictures optim.lr=0.1; may be repeated")
    return arguments


def read_config(arguments):
    from ppdensecl.config import load_config

    return load_config(arguments.config, [item for group in arguments.override for item in group])


_LAUNCHED = "PPDENSECL_LAUNCHED"


def gpu_build():
    """Whether the installed Paddle is one for GPUs; told without importing it."""
    try:
        return bool(metadata.version("paddlepaddle-gpu"))
    except metadata.PackageNotFoundError:
        return False


def launch(processes, logs, more):
    """Becomes Paddle's launcher of this command, with `more` arguments, in so many processes on this machine's CPU."""
    # The launcher wants a device of this list for each process, also of a Paddle without GPUs; one for GPUs would take NCCL.
    os.environ.update({_LAUNCHED: "1", "PADDLE_DISTRI_BACKEND": "gloo", "CUDA_VISIBLE_DEVICES": ",".join(["-1"] * processes)})
    os.execv(sys.executable, [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes),
                              "--log_level", "ERROR", "--log_dir", logs, *sys.argv, *more])


def run(main):
    """Runs main(); a UserError is printed (and logged) as one sentence, and the exit status is 1."""
    if _LAUNCHED in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no process outlives the launcher, however it ends
    _prepare_environment()
    logging.raiseExceptions = False  # a log line that a full disk refuses is lost, without a traceback for each
    try:
        main()
    except UserError as error:
        from ppdensecl.engine.logging import LOGGER

        if LOGGER.handlers:
            LOGGER.error(error)
        else:
            rank = os.environ.get("PADDLE_TRAINER_ID", "0")
            print(f"error: {error}" if rank == "0" else f"error of rank {rank}: {error}", file=sys.stderr, flush=True)
        time.sleep(getattr(error, "linger", 0))
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        sys.exit(130)
