"""One of two processes of tests/test_parallel.py: python -m paddle.distributed.launch --nproc_per_node 2 parallel_run.py FOLDER

Writes what it computed to FOLDER/<rank>.npz. `steps` is also what the test runs in one process, for comparison.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppdensecl  # noqa: E402,F401 (before paddle)
import numpy as np  # noqa: E402
import paddle  # noqa: E402

from ppdensecl import parallel  # noqa: E402
from ppdensecl.config import OptimConfig  # noqa: E402
from ppdensecl.engine.optimisation import build_optimizer  # noqa: E402
from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.models import DenseCL  # noqa: E402

STEPS, BATCH, PROCESSES = 20, 4, 2


def pictures(step):
    """float64 [R·N, 2, 3, 32, 32]: the views of all processes."""
    return np.random.default_rng(step).standard_normal((PROCESSES * BATCH, 2, 3, 32, 32))


def steps(bn_groups=1, accumulate=1, count=STEPS, loss_lambda=0.5):
    """{name: array}: the state after `count` steps, the gradients of the first and all losses."""
    paddle.set_default_dtype("float64")
    paddle.seed(0)
    model = DenseCL("resnet18", 32, 16, queue_len=30, stages=2, loss_lambda=loss_lambda, bn_groups=bn_groups, momentum=0.9)
    optimizer = build_optimizer(OptimConfig(lr=0.05), model)
    wrapped, stepper = parallel.wrap(model, optimizer)
    wrapped.train()
    found, losses = {}, []
    for step in range(count):
        model.update_key_encoder()
        outputs = []
        for micro in range(accumulate):
            mine = parallel.local(paddle.to_tensor(pictures(step * accumulate + micro)))
            quiet = parallel.world_size() > 1 and micro < accumulate - 1
            with wrapped.no_sync() if quiet else contextlib.nullcontext():
                output = wrapped(mine[:, 0], mine[:, 1], step=step)
                (output.loss / accumulate).backward()
            outputs.append(output)
        losses.append(float(output.loss))
        if step == 0:
            found.update({f"gradient {name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
        stepper.step()
        stepper.clear_grad()
        for output in outputs:
            model.enqueue(output)
    found.update({name: value.numpy() for name, value in model.state_dict().items()})
    paddle.set_default_dtype("float32")
    return {**found, "losses": np.array(losses)}


def exchanges():
    """What a shuffle does to rows that carry their own number."""
    rank, found = parallel.rank(), {}
    numbers = np.arange(PROCESSES * BATCH, dtype="float64")
    mine = paddle.to_tensor(numbers)[rank * BATCH:(rank + 1) * BATCH]
    for step in range(5):
        shuffle = parallel.Shuffle(PROCESSES * BATCH, 1, 7, step)
        x = shuffle.scatter(mine.reshape([-1, 1]).expand([BATCH, 3]).astype("float32"))
        shapes = ([6], [], [5, 2], [8, 4096])  # the last travels on its own
        everyones, own = [[x[:, :1].reshape([BATCH, *[1] * len(s)]).expand([BATCH, *s]) * (i + 1) for i, s in enumerate(part)]
                          for part in (shapes[:2], shapes[2:])]
        restored = shuffle.restore(everyones, own)()
        found[f"shuffled {step}"] = x[:, 0].numpy()
        found.update({f"restored {step} {i}": y.numpy() for i, y in enumerate(restored)})
    return found


def disagreements():
    """The sentences that `agree` has for all sorts of differences."""
    rank = parallel.rank()
    found = []
    for facts, error in (({"a": "1", "b": "2"}, None), ({"a": "1", "b": str(rank)}, None), ({"a": "x" * 2000 + str(rank)}, None),
                         ({"a": "1"} if rank else {"b": "1"}, None), ({}, UserError("no pictures hère") if rank else None)):
        try:
            parallel.agree(lambda: facts, error)
            found.append("")
        except UserError as raised:
            found.append(str(raised))
    return {"sentences": np.array(found), "mean": np.array(parallel.mean([float(rank), 1.0]))}


if __name__ == "__main__":
    parallel.start()
    results = {"exchanges": exchanges(), "disagreements": disagreements(), "plain": steps(),
               "moco": steps(count=2, loss_lambda=0.0), "accumulated": steps(accumulate=2, count=2)}
    np.savez(Path(sys.argv[1], f"{parallel.rank()}.npz"),
             **{f"{job}/{name}": value for job, result in results.items() for name, value in result.items()})
