"""Which device a process computes on, and with how many threads."""

import os

import paddle

from ppdensecl.errors import UserError
from ppdensecl.machine import cores, keep_freed_memory


def select(name):
    """Sets Paddle's device from `auto`, `cpu` or `gpu` and gives its name, e.g. `gpu:0`. Raises UserError."""
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if name == "gpu" and not gpus:
        reason = "no GPU is visible" if paddle.is_compiled_with_cuda() else "this paddlepaddle is the CPU build"
        raise UserError(f"'device' is 'gpu', but {reason}; use device=cpu, or install paddlepaddle-gpu")
    if name == "cpu" or not gpus:
        _set_threads()
        keep_freed_memory()
        paddle.set_device("cpu")
    else:
        paddle.set_device(f"gpu:{int(os.environ.get('FLAGS_selected_gpus', '0').split(',')[0])}")
    return paddle.get_device()


def threads():
    """CPU threads of this process: PPDENSECL_CPU_THREADS where it is set, else an even share of the cores."""
    asked = os.environ.get("PPDENSECL_CPU_THREADS", "")
    if asked:
        if not (asked.isascii() and asked.isdigit()) or int(asked) < 1:
            raise UserError(f"PPDENSECL_CPU_THREADS (or OMP_NUM_THREADS) is '{asked}', expected a whole number from 1")
        return int(asked)
    return max(1, cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))


def workers(where):
    """How many data workers suit a process that computes on `where`. A core makes some 300 pairs a second: more than a CPU can
    train on, whose cores are needed for that; a GPU gets its share of the cores, up to 8."""
    share = cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    return 1 if where == "cpu" else max(1, min(8, share - 1))


def _set_threads():
    # Setting OMP_NUM_THREADS before the import would do the same, but Paddle then prints a warning about it.
    paddle.base.core.set_num_threads(threads())
