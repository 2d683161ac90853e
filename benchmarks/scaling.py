"""One process per core against one process with all cores: python benchmarks/scaling.py [--batches 8 16 32] [--rounds 3]

The step of `step.py` (ResNet-50, 224 px) in one thread, in one process with a thread per core, in a process per core with a share
of the batch each, and in such processes without the exchange of gradients, keys and pictures: what is left is what it costs.
"""

import argparse

import measure
import step

WAYS = {"one process, one thread": "one process, one thread", "ours": f"one process, {step.CORES} threads",
        "ours, a process per core": f"{step.CORES} processes, one thread each",
        "processes that exchange nothing": f"{step.CORES} processes that exchange nothing"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=measure.RESULTS)
    arguments = parser.parse_args()
    rows, found = [], {}
    for batch in arguments.batches:
        found[batch] = answers = step.measured(WAYS, batch, arguments.rounds)
        rate = {way: batch / measure.median(turns) for way, turns in answers.items()}
        rows += [[batch, WAYS[way], rate[way], rate[way] / rate["one process, one thread"],
                  f"{max(turn['peak'] for turn in answers[way]):.0f}"] for way in WAYS]
    markdown = measure.table(["batch", "how", "pictures/s", "/ one thread", "peak MiB, together"], rows)

    def plot(figure):
        axes = figure.add_subplot()
        for name in WAYS.values():
            axes.plot(*zip(*[(row[0], row[2]) for row in rows if row[1] == name]), "o-", label=name)
        axes.set(xlabel="pictures a step", ylabel="pictures per second", xticks=arguments.batches, ylim=(0, None))
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside right")

    measure.write("scaling", {"rounds": arguments.rounds, "answers": found}, markdown, plot, arguments.folder)


if __name__ == "__main__":
    main()
