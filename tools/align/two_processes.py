"""One of two processes of a framework, started by run.py: python two_processes.py paddle|torch OUT

Paddle's pair is started by paddle.distributed.launch and trains through fleet's data-parallel model, PyTorch's through
DistributedDataParallel; both exchange by gloo. Each writes OUT/<framework>_<dtype>[_noise]_<rank>.npz.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ppdensecl import parallel  # noqa: E402 (imports Pillow before paddle)
import numpy as np  # noqa: E402
import steps  # noqa: E402
import torch  # noqa: E402

CASE = steps.Case("two processes", size=96, steps=3)
NOISE = (None, 11)


def main(framework, out):
    torch.set_num_threads(1)
    if framework == "paddle":
        parallel.start()
        rank = parallel.rank()
    else:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    state, views = CASE.state(), CASE.views(rank)
    for dtype in ("float32", "float64"):
        for noise in NOISE if framework == "torch" else (None,):
            if framework == "paddle":
                found = steps.run_paddle(CASE, dtype, state, views)
            else:
                found = steps.run_torch(CASE, dtype, state, views, noise)
            np.savez(Path(out, f"{framework}_{dtype}{'_noise' if noise else ''}_{rank}.npz"), **found)


if __name__ == "__main__":
    os.environ.setdefault("GLOG_minloglevel", "2")
    main(*sys.argv[1:])
