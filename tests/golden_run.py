"""Our training steps on the inputs of `recipe`, and how far they are from what the authors' own PyTorch code made of them.

As a script it is one of several processes: `python -m paddle.distributed.launch --nproc_per_node 2 golden_run.py FOLDER JOBS`
runs each job, {"name", "case", "steps", "fault"}, and writes rank 0's differences to FOLDER/0.json, rank 1's to FOLDER/1.json.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ppdensecl  # noqa: E402,F401 (before paddle)
import paddle  # noqa: E402
import pytest  # noqa: E402
import recipe  # noqa: E402

from ppdensecl import parallel, rng  # noqa: E402
from ppdensecl.config import OptimConfig  # noqa: E402
from ppdensecl.engine import device, optimisation  # noqa: E402
from ppdensecl.interop.layouts import from_torch, to_torch  # noqa: E402
from ppdensecl.models import DenseCL, densecl, matching  # noqa: E402

SMALL = ROOT / "tests" / "data" / "authors_numbers.json"
OPTIONS = {"lambda0": {"loss_lambda": 0.0}, "lambda1": {"loss_lambda": 1.0}, "warmup5": {"lambda_warmup_iters": 5},
           "papergrid2": {"num_grid": 2}}
BATCH = 4
KEPT = float(np.float32(0.9))  # the share of a running statistic that a step keeps: Paddle has it as float32


def golden_folder():
    """The folder with all of the authors' numbers, or None."""
    folder = os.environ.get("PPDENSECL_TEST_GOLDEN")
    return Path(folder) if folder and Path(folder).is_dir() else None


def authors_numbers(case, small=False):
    """{"steps", "grads", "after_step0", "final"}: all of them where the golden folder is, else the part in the small file."""
    if golden_folder() and not small:
        return json.loads((golden_folder() / f"{case}.json").read_text())
    return json.loads(SMALL.read_text())[case]


weight = functools.lru_cache(maxsize=None)(recipe.weight)


def build(depth, queue_len, dtype, **options):
    """The model with the recipe's weights and queues, in train mode."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as patch:  # random weights, to be replaced at once, take a third of a test's time
            patch.setattr(paddle.nn.initializer, "KaimingNormal", lambda: paddle.nn.initializer.Constant(0.0))
            model = DenseCL(f"resnet{depth}", queue_len=queue_len, **options)
    finally:
        paddle.set_default_dtype(before)
    values = {}
    for name, array in to_torch({name: value.numpy() for name, value in model.state_dict().items()}).items():
        if name.endswith("_ptr"):
            values[name] = array * 0
        elif name.startswith("queue"):
            values[name] = recipe.queue(name, *array.shape).astype(dtype)
        else:
            values[name] = weight(name.partition(".")[2], array.shape).astype(dtype)
    model.set_state_dict({name: paddle.to_tensor(array) for name, array in from_torch(values).items()})
    model.train()
    return model


class Step(NamedTuple):
    number: int
    output: densecl.DenseCLOutput
    model: DenseCL
    statistics: dict  # {our name: the running mean or variance that PyTorch would have}


def run(case, rates, size=128, arrays=None, **options):
    """Yields each step of a case before its gradients are cleared.

    rates: the steps' learning rates. arrays: a dict for what `_watch_arrays` sees. In several processes the authors'
    permutations stand in for ours.
    """
    options = {**OPTIONS.get(case.split("_")[1], {}), **options}
    dtype = "float64" if case.endswith("_f64") else "float32"
    model = build(int(case[1:3]), 256 if case.startswith("r18") else 512, dtype, **options)
    optimizer = optimisation.build_optimizer(OptimConfig(momentum=0.9, weight_decay=1e-4), model)
    wrapped, stepper = parallel.wrap(model, optimizer)
    statistics, follow = _follow_statistics(model)
    patch = pytest.MonkeyPatch()
    if parallel.world_size() > 1:
        patch.setattr(parallel, "rng", SimpleNamespace(Purpose=rng.Purpose, generator=lambda seed, purpose, step: SimpleNamespace(
            permutation=functools.partial(recipe.permutation, step))))
    if arrays is not None:
        _watch_arrays(model, arrays, patch)
    try:
        for number, rate in enumerate(rates):
            stepper.clear_grad()
            optimizer.set_lr(rate)
            model.update_key_encoder()
            views = recipe.images(number, BATCH, size, parallel.rank()).astype(dtype)
            output = wrapped(paddle.to_tensor(views[:, 0]), paddle.to_tensor(views[:, 1]), step=number)
            output.loss.backward()
            stepper.step()
            model.enqueue(output)
            follow()
            yield Step(number, output, model, statistics)
    finally:
        patch.undo()


def _follow_statistics(model):
    """The running statistics as PyTorch keeps them, and the function that brings them forward after a step.

    PyTorch's 0.9 is a float64, Paddle's a float32; PyTorch's variance is unbiased, Paddle's is not. From two values of
    Paddle's follows the statistic of the batch between them, and from that PyTorch's next value.
    """
    layers = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)}
    counts = {}
    for name, layer in layers.items():
        layer.register_forward_post_hook(
            lambda layer, _, y, name=name: counts.__setitem__(name, math.prod(y.shape) // y.shape[1]))

    def buffers():
        return {f"{name}.{leaf}": getattr(layer, leaf).numpy().astype("float64")
                for name, layer in layers.items() for leaf in ("_mean", "_variance")}

    before = buffers()
    statistics = dict(before)

    def follow():
        for name, after in buffers().items():
            of_batch = (after - KEPT * before[name]) / (1 - KEPT)
            if name.endswith("._variance"):
                n = counts[name.rpartition(".")[0]]
                of_batch = of_batch * n / (n - 1)
            statistics[name] = 0.9 * statistics[name] + 0.1 * of_batch
            before[name] = after

    return statistics, follow


def _watch_arrays(model, found, patch):
    """In every forward pass {the npz files' name: array} goes into `found`."""

    def keep(**arrays):
        for name, array in arrays.items():
            if array is not None:
                found[name] = array.numpy()

    def channels_first(x):
        return None if x is None else x.transpose([0, 2, 1])

    def flat(x):
        return None if x is None else x.flatten(2)

    q = model.encoder_q
    q.backbone.register_forward_post_hook(lambda _, x, y: keep(feat_q=y))
    model.encoder_k.backbone.register_forward_post_hook(lambda _, x, y: keep(feat_k_shuf=y))
    q.head.register_forward_post_hook(lambda _, x, y: keep(q_raw=y[0], q_grid_raw=flat(y[1]), q2_raw=y[2]))
    q.register_forward_post_hook(lambda _, x, y: keep(q=y[0], q_grid=channels_first(y[1]), q2=y[2]))
    match, take, info_nce = matching.match, matching.take, densecl.info_nce

    def watched_match(query, key):
        keep(q_b=channels_first(query), k_b=channels_first(key))
        return match(query, key)

    def watched_take(key, index):
        keep(k_grid=channels_first(key))
        return take(key, index)

    def watched_info_nce(query, positive, negatives, *rest):
        end = "" if len(query) == BATCH else "_dense"
        keep(**{f"l_pos{end}": (query * positive).sum(axis=1, keepdim=True), f"l_neg{end}": query @ negatives.T})
        return info_nce(query, positive, negatives, *rest)

    patch.setattr(matching, "match", watched_match)
    patch.setattr(matching, "take", watched_take)
    patch.setattr(densecl, "info_nce", watched_info_nce)


# --- differences ---

def _away(a, b):
    """|a − b|, relative where b is greater than 1; infinite for what is no number."""
    a, b = np.asarray(a, dtype="float64"), np.asarray(b, dtype="float64")
    if a.shape != b.shape or not np.isfinite(a).all():
        return math.inf
    return float((abs(a - b) / np.maximum(1, abs(b))).max())


def from_checksum(array, checksum):
    a = np.asarray(array, dtype="float64")
    if a.size != checksum["n"]:
        return math.inf
    ours = {"mean": a.mean(), "std": a.std(), "l2": np.sqrt((a * a).sum()), "absmax": abs(a).max(), "first": a.ravel()[:4]}
    return max(_away(ours[name], checksum[name]) for name in ours)


def theirs(model, statistics=()):
    """The model's state under the authors' names; `statistics` stands in for our running means and variances."""
    return to_torch({**{name: value.numpy() for name, value in model.state_dict().items()}, **dict(statistics)})


def gradients(model):
    return to_torch({name: p.grad.numpy() for name, p in model.named_parameters()
                     if not p.stop_gradient and p.grad is not None})


def from_record(step, record):
    """{what: difference} of one step; whole numbers count what is not equal."""
    out, model, weight = step.output, step.model, record["loss_lambda"]
    loss = (1 - weight) * record["raw_single"] + weight * record["raw_dense"]
    found = {"λ": float(out.loss_lambda != weight), "global loss": _away(out.loss_global, record["raw_single"]),
             "loss": _away(out.loss, loss)}
    norm = np.linalg.norm([np.linalg.norm(p.grad.numpy()) for p in model.parameters() if p.grad is not None])
    found["gradient norm"] = _away(norm / record["grad_total_l2"], 1)
    queues = [("queue", model.queue)]
    if out.loss_dense is not None:
        found["dense loss"] = _away(out.loss_dense, record["raw_dense"])
        found["matches"] = float((out.matches.numpy() != np.array(record["sim_ind"])).sum())
        queues.append(("queue2", model.queue_dense))
    for name, queue in queues:
        found[f"{name} pointer"] = float(abs(int(queue.pointer) - record[f"{name}_ptr"]))
        found[name] = from_checksum(queue.keys.numpy().T, record[name])
    if parallel.world_size() > 1:  # what the authors log is weighted, and the mean of the processes
        logged = [(out.loss_global, 1 - weight, "loss_contra_single"), (out.loss_dense, weight, "loss_contra_dense"),
                  (out.loss, 1, "loss")]
        found["logged losses"] = max(_away(factor * float(parallel.gather(value.detach().reshape([1])).mean()), record[name])
                                     for value, factor, name in logged)
    return found


def from_checksums(arrays, checksums):
    """{name: difference} of all entries that both have."""
    return {name: from_checksum(arrays[name], checksum) for name, checksum in checksums.items() if name in arrays}


def from_arrays(found, arrays, permutation):
    """{name: difference} for the arrays of an npz file. Gradients: relative L2; all else as the checksums."""
    result = {}
    for name, array in arrays.items():
        if name in ("img", "idx_unshuffle") or name not in found:
            continue
        ours = found[name]
        if name == "feat_k_shuf":
            ours = ours[permutation]
        if name == "densecl_sim_ind":
            result[name] = float((ours != array).sum())
        elif name.startswith("grad/"):
            norm = np.linalg.norm(array)
            result[name] = float(np.linalg.norm(ours.astype("float64") - array) / norm) if norm else float(abs(ours).max())
        elif ours.shape != array.shape or not np.isfinite(ours).all():
            result[name] = math.inf
        else:
            result[name] = float(abs(ours.astype("float64") - array).max())
    return result


def align(case, steps=None, arrays=None, small=False):
    """Runs a case: a list with each step's {what: difference}.

    "gradients" (of step 0) and "state" (after step 0 and after the last one) are the worst of all entries. arrays: an npz
    file, for which the last dict gets an entry "arrays: NAME" for each array that we have, too. small: see `authors_numbers`.
    """
    numbers = authors_numbers(case, small)
    records, result, found = numbers["steps"][:steps], [], None if arrays is None else {}
    for step in run(case, [record["lr"] for record in records], arrays=found):
        model, output = step.model, step.output
        differences = from_record(step, records[step.number])
        if step.number == 0:
            grads, state = gradients(model), theirs(model, step.statistics)
            differences["gradients"] = max(from_checksums(grads, numbers["grads"]).values())
            differences["state"] = max(from_checksums(state, numbers["after_step0"]).values())
            if arrays is not None:
                captured = {**found, "k": parallel.local(output.keys).numpy(),
                            **{f"grad/{name}": array for name, array in grads.items()},
                            **{f"after0/{name}": array for name, array in state.items()}}
                if output.loss_dense is not None:
                    captured.update(k2=parallel.local(output.keys_dense).numpy(), densecl_sim_ind=output.matches.numpy())
        if step.number == len(numbers["steps"]) - 1 and "final" in numbers:
            state, plain = theirs(model, step.statistics), theirs(model)
            differences["state"] = max(from_checksums(state, numbers["final"]).values())
            differences["(running variances as Paddle has them)"] = max(from_checksums(plain, {
                name: value for name, value in numbers["final"].items() if name.endswith("running_var")}).values())
            if arrays is not None:
                captured.update({f"final/{name}": state[name] for name in ("queue", "queue2") if name in state})
        result.append(differences)
    if arrays is not None:
        compared = from_arrays(captured, arrays, records[0]["perm"])
        result[-1].update({f"arrays: {name}": value for name, value in compared.items()})
    return result


def beyond(differences, tolerance):
    """The differences that are greater than the tolerance; what stands in brackets is only for the reader."""
    return {what: value for what, value in differences.items() if not value <= tolerance and not what.startswith("(")}


# --- two processes ---

def two_processes(folder, jobs):
    """Runs jobs, {"name", "case", "steps", "fault", "arrays", "small"}, in two processes: [{name: align's result}] by rank.

    In a case's name {rank} is the process.
    """
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "log"),
               __file__, str(folder), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    logs = "".join(log.read_text()[-3000:] for log in sorted((folder / "log").glob("workerlog.*")))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:] + logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def main(folder, jobs):
    import test_faults

    device.select("cpu")
    parallel.start()
    results = {}
    for job in json.loads(jobs):
        case, small = job["case"].format(rank=parallel.rank()), job.get("small", False)
        patch = pytest.MonkeyPatch()
        if job.get("fault"):
            test_faults.IN_TWO_PROCESSES[job["fault"]](patch)
        arrays = np.load(golden_folder() / f"{case}.npz") if job.get("arrays") else None
        results[job["name"]] = align(case, job["steps"], arrays, small)
        patch.undo()
    Path(folder, f"{parallel.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
