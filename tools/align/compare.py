"""Rows of a comparison: how far two arrays are apart, how far they may be, and why that far."""

import contextlib
import io
import json
import logging
from dataclasses import asdict, dataclass

import numpy as np
from reprod_log import ReprodDiffHelper, ReprodLogger

# An array may differ by five times what rounding does to the reference itself (`noise`), each as a root mean square over its
# entries. Not as the largest entry: one ReLU whose input rounds to the other side of zero changes single gradients by a thousand
# times the noise of the others. The floor, in units of the array's own root mean square, is for what moved weights
# do not show: another order of the sums, and a number that rounding leaves alone by luck.
FACTOR = 5
FLOOR = 64
GUIDE = 1e-6  # of the reproduction guide, for the mean absolute difference of an array


@dataclass
class Row:
    check: str  # e.g. "one step, resnet50"
    name: str  # group/array
    dtype: str
    largest: float  # difference
    mean: float
    rms: float
    tolerance: float  # of the rms where there is a `noise`, else of the largest
    noise: float  # rms under rounding, what the tolerance comes from; nan where the tolerance is exact or explained in `why`
    passed: bool
    why: str = ""


def row(check, name, dtype, ours, theirs, tolerance, noise=float("nan"), why=""):
    """One row; arrays of different shape or with a nan fail."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return failure(check, name, dtype, f"shape {list(ours.shape)}, reference {list(theirs.shape)}")
    difference = np.abs(ours.astype("float64") - theirs.astype("float64"))
    largest, mean, rms = float(difference.max()), float(difference.mean()), _rms(difference)
    passed = (largest if np.isnan(noise) else rms) <= tolerance
    return Row(check, name, dtype, largest, mean, rms, float(tolerance), float(noise), bool(passed), why)


def failure(check, name, dtype, why):
    return Row(check, name, dtype, float("inf"), float("inf"), float("inf"), 0.0, float("nan"), False, why)


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def noise(theirs, others):
    """What rounding does to the reference, {name: array}: for each entry the largest change over its `others` runs."""
    found = {}
    for other in others:
        for name, value in other.items():
            change = np.abs(value.astype("float64") - theirs[name])
            found[name] = change if name not in found else np.maximum(found[name], change)
    return found


def rows(check, dtype, ours, theirs, noise):
    """A row for each of our arrays."""
    found = []
    for name in ours:
        if name not in theirs:
            found.append(failure(check, name, dtype, "the reference has none"))
        elif name == "matches/matches":
            found.append(_matches(check, dtype, ours, theirs, noise))
        elif theirs[name].dtype.kind in "iu":
            found.append(row(check, name, dtype, ours[name], theirs[name], 0))
        else:
            reference = theirs[name].astype("float64")
            tolerance = FACTOR * _rms(noise[name]) + FLOOR * np.finfo(dtype).eps * _rms(reference)
            found.append(row(check, name, dtype, ours[name], reference, tolerance, _rms(noise[name])))
    return found


def _matches(check, dtype, ours, theirs, noise):
    """Which key position is the most similar may change where the best two are equal within rounding noise, and only there."""
    gap = theirs["matches/gap"]
    differs = (ours["matches/matches"] != theirs["matches/matches"]) & (gap > FACTOR * noise["matches/gap"].max())
    return row(check, "matches/matches", dtype, differs.astype(int), np.zeros_like(gap), 0, why=
               f"positions that differ, of {gap.size}; smallest gap between best and second {gap.min():.1e}")


def write_pair(folder, check, group, dtype, ours, theirs, noise, name=None):
    """NAME_paddle.npy, NAME_ref.npy and NAME_diff.log, as Paddle's reproduction guide has them, of the arrays of one group.

    Returns a row that says whether reprod-log itself is satisfied: with the guide's 1e-6, or where rounding noise is larger than
    a fifth of that, with five times the noise.
    """
    stem = f"{name or group}{'' if dtype == 'float32' else f'_{dtype}'}"
    chosen = [key for key in ours if key.startswith(group + "/")]
    threshold = max(GUIDE, FACTOR * max(float(noise[key].mean()) for key in chosen))
    for suffix, arrays in (("paddle", ours), ("ref", theirs)):
        logger = ReprodLogger()
        for key in chosen:
            logger.add(key, np.asarray(arrays[key]))
        logger.save(str(folder / f"{stem}_{suffix}.npy"))
    helper = ReprodDiffHelper()
    helper.compare_info(*(helper.load_info(str(folder / f"{stem}_{suffix}.npy")) for suffix in ("paddle", "ref")))
    log = folder / f"{stem}_diff.log"
    with _root_logger_lent(), contextlib.redirect_stdout(io.StringIO()):
        helper.report(diff_threshold=threshold, path=str(log))
    passed = "diff check passed" in log.read_text()
    means = [float(values["mean"]) for values in helper.diff_dict.values()]
    return Row(check, f"reprod-log/{log.name}", dtype, max(means), float(np.mean(means)), _rms(means), threshold, float("nan"),
               passed, f"mean differences of {len(means)} arrays, as reprod-log sees them")


@contextlib.contextmanager
def _root_logger_lent():
    """reprod-log writes through the root logger and leaves its files open there: the next log would go into this one too."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        root.setLevel(level)


def write_table(folder, found, header):
    """table.json with every row, table.md with every row, summary.md with the row nearest to its tolerance of each group."""
    as_json = [{key: value if not isinstance(value, float) or np.isfinite(value) else None for key, value in asdict(r).items()}
               for r in found]
    (folder / "table.json").write_text(json.dumps({**header, "rows": as_json}, indent=1), encoding="utf-8")
    lines = ["| check | array | dtype | largest difference | mean | rms | tolerance | noise | |",
             "|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r.check} | {r.name} | {r.dtype} | {r.largest:.1e} | {r.mean:.1e} | {r.rms:.1e} | "
              f"{r.tolerance:.1e} | {'' if np.isnan(r.noise) else f'{r.noise:.1e}'} | "
              f"{'ok' if r.passed else '**FAILED**'} {r.why} |" for r in found]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = summarise(found)
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    return summary


def summarise(found):
    groups = {}
    for r in found:
        groups.setdefault((r.check, r.name.split("/")[0], r.dtype), []).append(r)
    lines = ["| check | arrays | | dtype | nearest to its tolerance | largest difference | mean | rms | tolerance | |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for (check, group, dtype), members in groups.items():
        worst = max(members, key=_used)
        name = worst.name.partition("/")[2].replace("encoder_", "")
        failed = sum(not r.passed for r in members)
        lines.append(f"| {check} | {group} | {len(members)} | {dtype} | {name} | {worst.largest:.1e} | {worst.mean:.1e} | "
                     f"{worst.rms:.1e} | {worst.tolerance:.1e} | {f'**{failed} FAILED**' if failed else 'ok'} |")
    return "\n".join(lines) + "\n"


def _used(r):
    """The share of its tolerance that a row uses."""
    measure = r.largest if np.isnan(r.noise) else r.rms
    return (not r.passed, measure / r.tolerance if r.tolerance else measure)
