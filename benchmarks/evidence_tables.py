"""The tables and curves of docs/results.md, from what benchmarks/evidence.py found: python benchmarks/evidence_tables.py OUT

Writes docs/benchmarks/evidence_*.md, .json and .png; `python benchmarks/page.py` puts the tables into the page.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

from evidence import ABLATIONS, LABELS, METHODS, NAMES, SHORT
from measure import RESULTS

STARTS = ("random", *METHODS)
T95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # of Student's t, two-sided, by pairs
MOVED = "cells whose own position is wrong"  # as tools/eval.py calls it
SCORES = {  # name of the row, and which number of the result
    "probe234": ("linear probe, stages 2–4, mIoU", None), "probe4": ("linear probe, last stage, mIoU", None),
    **{f"seg_{share}": (f"FCN, {share} % of the labels, mIoU", None) for share in LABELS},
    "det": ("BCCD detection, box AP", None),
    "retrieval_scenes": ("same scene, unseen frames", None), "retrieval_frames": ("same frame, unseen frames", None),
    "retrieval_photos": ("same picture, training pictures", None),
    "matches_camvid": ("dense matches, unseen frames", None),
    "matches_camvid.moved": ("… where the own position is wrong", MOVED),
    "matches_photos": ("dense matches, training pictures", None),
    "matches_photos.moved": ("… where the own position is wrong", MOVED),
}


def number(result, start, shown):
    """A score in percent of a JSON of evidence.py, or None where it has none."""
    if "score" in result:
        value = float(re.search(r"[\d.]+", result["score"])[0])
        return value if "AP" in result["score"] else 100 * value
    if shown is not None:
        return 100 * result["details"][start]["shown"][shown] if start in result["details"] else None
    return 100 * result[start] if start in result else None


def found(out, epochs):
    """{(what, start, seed): percent} of the results of runs of so many epochs that are there, and of the random starts beside them."""
    values = {}
    for what, (_, shown) in SCORES.items():
        for path in (out / "scores").glob(f"{what.partition('.')[0]}_*.json"):
            match = re.fullmatch(rf"_(?:({'|'.join(METHODS)}){epochs}|(random))_s(\d+)", path.stem[len(what.partition(".")[0]):])
            if match:
                result, start, seed = json.loads(path.read_text()), match[1] or match[2], int(match[3])
                each = {start: number(result, "trained", shown)}
                if "score" not in result:
                    each["random"] = number(result, "random", shown)
                values.update({(what, who, seed): value for who, value in each.items() if value is not None})
    # A random start is scored once, for the runs of all budgets.
    return {(what, start, seed): value for (what, start, seed), value in values.items()
            if any((what, method, seed) in values for method in METHODS)}


def spread(numbers):
    return "–" if not numbers else f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def difference(values, what, a, b):
    """The difference a − b of each seed, in bold where a paired t-test of 95 % takes it for more than noise."""
    seeds = sorted(seed for kind, start, seed in values if (kind, start) == (what, a) and (what, b, seed) in values)
    pairs = [values[what, a, seed] - values[what, b, seed] for seed in seeds]
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else "–"
    text = f"{mean(pairs):+.1f} ± {stdev(pairs):.1f}"
    limit = T95.get(min(len(pairs), 10), float("inf")) * stdev(pairs) / len(pairs) ** 0.5
    return f"**{text}**" if abs(mean(pairs)) > limit else text


def main_table(values):
    yield "| % | random | MoCo-v2 | DenseCL | MoCo-v2 − random | DenseCL − random | DenseCL − MoCo-v2 | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    for what, (name, _) in SCORES.items():
        each = {start: {seed: value for (kind, who, seed), value in values.items() if (kind, who) == (what, start)}
                for start in STARTS}
        if any(each.values()):
            cells = [spread(list(each[start].values())) for start in STARTS]
            cells += [difference(values, what, a, b) for a, b in (("moco", "random"), ("densecl", "random"), ("densecl", "moco"))]
            counts = sorted({len(numbers) for numbers in each.values()})
            yield f"| {name} | " + " | ".join(cells) + f" | {counts[-1] if len(counts) == 1 else f'{counts[0]}–{counts[-1]}'} |"


TITLES = {"lambda_0": "λ 0 (MoCo-v2)", **{f"lambda_{share}": f"λ {share}" for share in (0.1, 0.3, 0.7, 0.9)},
          "matching_embedding": "matching by dense embeddings", "matching_random": "random matching", "grid_1": "grid 1",
          "grid_3": "grid 3", "queue_8192": "K 8192", "queue_8192_lambda_0": "K 8192, λ 0",
          "warmup_8_epochs": "λ 0 for the first 8 epochs", "views_160": "views of 160 px (5×5 cells)",
          "views_160_lambda_0": "views of 160 px, λ 0"}


def ablation_table(out):
    columns = ("probe234", "probe4", "matches_camvid", "matches_camvid.moved", "matches_photos", "matches_photos.moved")
    yield "| | " + " | ".join(SCORES[what][0] for what in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    base = f"densecl{SHORT}_s0"
    rows = [("random start", base, "random"),
            ("λ 0.5, matching by the backbone, the map's own grid (4×4), K 2048", base, "trained"),
            (TITLES["lambda_0"], f"moco{SHORT}_s0", "trained"), *((TITLES[name], name, "trained") for name in ABLATIONS)]
    for title, run, start in rows:
        cells = []
        for what in columns:
            path = out / "scores" / f"{what.partition('.')[0]}_{run}.json"
            value = number(json.loads(path.read_text()), start, SCORES[what][1]) if path.exists() else None
            cells.append("–" if value is None else f"{value:.1f}")
        if set(cells) != {"–"}:
            yield f"| {title} | " + " | ".join(cells) + " |"


def curves(out, epochs, path):
    """The shares of dense matches that are right over training time, from the logs of whole pre-trainings."""
    from matplotlib.figure import Figure

    from ppdensecl.visual.curves import read_correspondence

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    everywhere, moved = figure.subplots(1, 2, sharex=True)
    logs = [(NAMES[method], colour, log) for method, colour in (("moco", "tab:orange"), ("densecl", "tab:blue"))
            for log in sorted(out.glob(f"{method}{epochs}_s*/train.log"))]
    if epochs == SHORT:
        logs.append((f"DenseCL, {TITLES['warmup_8_epochs']}", "tab:green", out / "warmup_8_epochs/train.log"))
    named, chances = set(), []

    def plot(axis, points, share, name, **style):
        label = None if (axis, name) in named else name
        axis.plot(points["iteration"], [100 * value for value in points[share]], label=label, **style)
        named.add((axis, name))

    for name, colour, log in logs:
        if not (log.parent / f"epoch_{epochs}.pdstates").exists():
            continue
        points = read_correspondence(log)
        for axis, share in ((everywhere, "right"), (moved, "elsewhere")):
            plot(axis, points, share, name, marker=".", color=colour)
        plot(everywhere, points, "own", "each cell its own position, by seed", linestyle="--", linewidth=1, color="grey")
        chances += points["chance"]
    for axis in (everywhere, moved):
        if chances:
            axis.axhline(100 * mean(chances), color="grey", linestyle=":", label="a random match")
        axis.set(xlabel="iteration", ylabel="%", ylim=(0, None))
        axis.grid(alpha=0.3)
    everywhere.set_title("cells matched to within one cell of the truth", fontsize=10)
    moved.set_title("the same, of cells whose own position is wrong", fontsize=10)
    figure.legend(*everywhere.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    out, numbers = Path(sys.argv[1]), []
    budgets = sorted({int(match[1]) for path in out.glob("*_s*/config.yaml")
                      if (match := re.search(r"(\d+)_s\d+$", path.parent.name))})
    tables = {"ablations": ablation_table(out)}
    for epochs in budgets:
        values = found(out, epochs)
        if not values:
            continue
        tables[epochs] = main_table(values)
        numbers += [{"epochs": epochs, "what": what, "start": start, "seed": seed, "percent": round(value, 3)}
                    for (what, start, seed), value in sorted(values.items())]
        curves(out, epochs, RESULTS / f"evidence_{epochs}.png")
    for name, lines in tables.items():
        (RESULTS / f"evidence_{name}.md").write_text("\n".join(lines) + "\n")
        print((RESULTS / f"evidence_{name}.md").read_text())
    (RESULTS / "evidence.json").write_text(json.dumps(numbers, indent=0) + "\n")


if __name__ == "__main__":
    main()
