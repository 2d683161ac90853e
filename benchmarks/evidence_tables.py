"""The tables and curves of docs/results.md, from what benchmarks/evidence.py found: python benchmarks/evidence_tables.py OUT

Writes docs/benchmarks/evidence_*.md, .json and .png; `python benchmarks/page.py` puts the tables into the page.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

from evidence import ABLATIONS, LABELS
from measure import RESULTS

STARTS = ("random", "moco", "densecl")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of Student's t, two-sided, by the number of pairs


def found(out):
    """{(what, start, number of the pair): percent} of all results that are there."""
    values = {}
    for path in sorted((out / "scores").glob("*.json")):
        result = json.loads(path.read_text())
        if match := re.fullmatch(r"(probe\d+|matches|retrieval_\w+?)_(moco|densecl)_s(\d+)(?:_e(\d+))?", path.stem):
            what, start, first, seed = match.groups()
            number = int(first if seed is None else seed)
            values[what, start, number] = 100 * result["trained"]
            if "random" in result:
                values[what, "random", number] = 100 * result["random"]
        elif match := re.fullmatch(r"(seg_\d+|det)_(random|moco|densecl)(?:_s\d+)?_e(\d+)", path.stem):
            score = re.search(r"mIoU ([\d.]+)|bbox: AP ([\d.]+)", result["line"])
            values[match[1], match[2], int(match[3])] = 100 * float(score[1]) if score[1] else float(score[2])
    return values


def spread(numbers):
    numbers = list(numbers)
    return "–" if not numbers else f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def difference(values, what, a, b):
    """The paired difference a − b, in bold where a paired t-test of 95 % says that it is more than noise."""
    pairs = [values[what, a, n] - values[what, b, n] for n in range(100) if (what, a, n) in values and (what, b, n) in values]
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else "–"
    text = f"{mean(pairs):+.1f} ± {stdev(pairs):.1f}"
    return f"**{text}**" if abs(mean(pairs)) > T95[len(pairs)] * stdev(pairs) / len(pairs) ** 0.5 else text


def main_table(values):
    names = {"probe234": "linear probe, stages 2–4, mIoU", "probe4": "linear probe, last stage, mIoU",
             **{f"seg_{share}": f"FCN, {share} % of the labels, mIoU" for share in LABELS}, "det": "BCCD detection, box AP",
             "retrieval_camvid": "same scene among 233 unseen frames",
             "retrieval_photos": "same picture among 600 of the training set",
             "matches": "dense matches within a cell of the truth"}
    yield "| % | random | MoCo-v2 | DenseCL | MoCo-v2 − random | DenseCL − random | DenseCL − MoCo-v2 | n |"
    yield "|---|---|---|---|---|---|---|---|"
    for what, name in names.items():
        each = {start: [value for (kind, who, _), value in values.items() if (kind, who) == (what, start)] for start in STARTS}
        if any(each.values()):
            cells = [spread(each[start]) for start in STARTS]
            cells += [difference(values, what, a, b) for a, b in (("moco", "random"), ("densecl", "random"), ("densecl", "moco"))]
            yield f"| {name} | " + " | ".join(cells) + f" | {max(map(len, each.values()))} |"


def ablation_table(out):
    yield "| | linear probe, stages 2–4 | last stage | matches |"
    yield "|---|---|---|---|"
    for name in ABLATIONS:
        scores = {what: out / "scores" / f"{what}_short_{name}.json" for what in ("probe234", "probe4", "matches")}
        if all(path.exists() for path in scores.values()):
            results = {what: json.loads(path.read_text()) for what, path in scores.items()}
            for start in (["random"] if name == "base" else []) + ["trained"]:
                label = "random start" if start == "random" else name.replace("_", " ")
                yield f"| {label} | " + " | ".join(f"{100 * results[what][start]:.1f}" for what in scores) + " |"


def curves(out, path):
    """The share of matches within one cell of the truth over training time, from the logs of the pre-trainings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis, colours = figure.subplots(), {"densecl": "tab:blue", "moco": "tab:orange"}
    for log in sorted(out.glob("*_s*/train.log")):
        points = {int(at): (float(share), float(chance)) for at, share, chance in re.findall(
            r"correspondence at iteration (\d+)/\d+: ([\d.]+), chance ([\d.]+)", log.read_text())}
        method, seed = log.parent.name.split("_s")
        if points:
            label = {"densecl": "DenseCL", "moco": "MoCo-v2"}[method] if seed == "0" else None
            times = sorted(points)
            axis.plot(times, [100 * points[at][0] for at in times], color=colours[method], marker=".", label=label)
            axis.axhline(100 * points[0][0], color="grey", linestyle=":", label="random start" if label == "DenseCL" else None)
            axis.axhline(100 * points[0][1], color="grey", linestyle="--", label="a random match" if label == "DenseCL" else None)
    axis.set(xlabel="iteration", ylabel="dense matches within one cell of the truth, %", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main():
    out = Path(sys.argv[1])
    values = found(out)
    for name, lines in (("main", main_table(values)), ("ablations", ablation_table(out))):
        (RESULTS / f"evidence_{name}.md").write_text("\n".join(lines) + "\n")
        print((RESULTS / f"evidence_{name}.md").read_text())
    numbers = [{"what": what, "start": start, "seed": seed, "percent": round(value, 3)}
               for (what, start, seed), value in sorted(values.items())]
    (RESULTS / "evidence.json").write_text(json.dumps(numbers, indent=0) + "\n")
    curves(out, RESULTS / "evidence.png")


if __name__ == "__main__":
    main()
