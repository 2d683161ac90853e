"""What the benchmarks share: ways of doing the same thing, measured in alternation, and the report of what was found.

Each way is a process of its own, so that it has its own framework, environment and peak of memory. They wait for their turn:
one round of each, again and again, so that a noisy machine is noisy for all of them.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/benchmarks"
sys.path.insert(0, str(ROOT))


def memory(what):
    """MiB of this process: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(what)


def serve(once):
    """The life of a way: runs once() for each line that comes, and answers with its seconds, CPU seconds and memory in MiB:
    `before` and at most `extra` more. What once() returns, a dict or None, is part of the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
        found = once() or {}
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "cpu": time.process_time() - cpu, "before": before, "peak": memory("VmHWM"), **found}
        answer["extra"] = answer["peak"] - before
        print(json.dumps(answer), file=answers, flush=True)


class _Way:
    def __init__(self, name, command, environment):
        self.name = name
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **environment})

    def turn(self):
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"error: '{self.name}' ended with status {self.process.wait()}")
        time.sleep(0.25)  # until its OpenMP threads spin no more
        return json.loads(answer)

    def end(self):
        self.process.stdin.close()  # it leaves `serve`, and so do the processes that it has started
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def in_turn(ways, rounds, warm=1, together=True):
    """{name: (command, environment)} → {name: [answer]} of `rounds` rounds in alternation, after `warm` that do not count.

    Not together, each turn is a process of its own, which warms up first: for ways that do not fit into memory side by side.
    """
    found, running = {name: [] for name in ways}, {}
    try:
        for turn in range(warm + rounds if together else rounds):
            for name, (command, environment) in ways.items():
                way = running[name] = running.get(name) or _Way(name, command, environment)
                if not together:
                    for _ in range(warm):
                        way.turn()
                answer = way.turn()
                if not together:
                    running.pop(name).end()
                if not together or turn >= warm:
                    found[name].append(answer)
    finally:
        for way in running.values():
            way.end()
    return found


def median(answers, key="seconds"):
    values = sorted(answer[key] for answer in answers)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def machine():
    """What the numbers were found on, as text."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    from ppdensecl.machine import cores

    installed = []
    for package in ("paddlepaddle", "torch", "numpy", "opencv-python", "pillow"):
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass
    return (f"{cores()} cores of an {names[0] if names else platform.machine()}, "
            f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB, "
            f"Python {platform.python_version()}, {', '.join(installed)}")


def table(header, rows):
    """A Markdown table; numbers with three digits."""
    def text(cell):
        return f"{cell:.3g}" if isinstance(cell, float) and abs(cell) < 1000 else f"{cell:.0f}" if isinstance(cell, float) else str(cell)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def write(name, findings, markdown, plot, folder=RESULTS):
    """Writes name.json, name.md and name.png to the folder, and prints the Markdown. plot(figure) draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    text = f"`{command}`\n\n{markdown}\n\n{machine()}; load before: {os.getloadavg()[0]:.1f}\n"
    (folder / f"{name}.json").write_text(json.dumps({"command": command, "machine": machine(), **findings}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    figure = plt.figure(figsize=(9, 3.5), constrained_layout=True)
    plot(figure)
    figure.savefig(folder / f"{name}.png", dpi=110)
    print(text)
