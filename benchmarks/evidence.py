"""The experiment of docs/results.md: does pre-training help, and does DenseCL help more than MoCo-v2?

python benchmarks/evidence.py DATA pretrain probe --print        the commands, to read or to paste
python benchmarks/evidence.py DATA pretrain probe --jobs 2       runs those that have no result yet; start it again to go on

DATA holds photos/images/*.jpg, camvid/ in PaddleSeg's layout and bccd_voc/ in VOC's (see docs/results.md). Parts: pretrain,
ablations, probe, few (probes of the ablations), matches, retrieval, controls, export, seg, det, predict. Each command uses one CPU
thread; its output goes to OUT/logs, what it found to OUT/scores. benchmarks/evidence_tables.py makes the tables of these.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/densecl_r18_evidence.yaml"
METHODS = {"moco": ["model.loss_lambda=0"], "densecl": []}
NAMES = {"random": "random start", "moco": "MoCo-v2", "densecl": "DenseCL"}
SHORT = 16  # epochs of an ablation
ABLATIONS = {
    "base": [], "lambda_0": ["model.loss_lambda=0"],
    **{f"lambda_{share}": [f"model.loss_lambda={share}"] for share in (0.1, 0.3, 0.7, 0.9)},
    **{f"matching_{kind}": [f"model.matching={kind}"] for kind in ("embedding", "random")},
    **{f"grid_{side}": [f"model.num_grid={side}"] for side in (1, 3)},
    "queue_8192": ["model.queue_len=8192"],
}
LABELS = {"10": 10, "50": 2, "100": 1}  # share of CamVid's training labels in percent: every n-th frame of its list


class Row(NamedTuple):
    name: str
    commands: list  # one after another
    results: list = None  # the JSON that each of them writes; without, the last line of output is the result


def rows(part, data, out, pretrained, seeds):
    """The rows of a part. `pretrained`: seeds of the pre-training; `seeds`: of the evaluation, whose number s starts from the
    pre-training of seed s, or of the first where there are fewer."""
    photos = [f"data.list_file={out}/unlabelled.txt", f"data.root={data}"]
    pairs = [(pretrained[number] if number < len(pretrained) else pretrained[0], seed) for number, seed in enumerate(seeds)]

    def train(name, seed, more):
        return Row(f"pretrain_{name}", [["tools/train.py", "-c", CONFIG, "--processes", "1", "--resume", "-o", *photos,
                                         f"output_dir={out}/{name}", f"seed={seed}", *more]])

    def score(kind, run, more, beside, seed=None):
        """A command of tools/eval.py, and its result; `beside`: a random start is scored, too."""
        path = f"{out}/scores/{kind}_{run}" + ("" if seed is None else f"_e{seed}") + ".json"
        return ["tools/eval.py", "-c", f"{out}/{run}/config.yaml", "--checkpoint", f"{out}/{run}/latest", *more,
                *([] if beside else ["--no-random"]), "--out", path, *([] if seed is None else ["-o", f"seed={seed}"])], path

    def row(name, *commands):
        return Row(name, *map(list, zip(*commands)))

    frames = ["--task", "dense", "--train-list", f"{data}/camvid/train.txt", "--test-list", f"{data}/camvid/test.txt", "--size",
              "180", "240", "--cache", f"{out}/features", "--stage"]

    def linear(run, beside, seeds=(None,)):  # one row, for all of it reads the same features
        return row(f"probe_{run}", *(score(f"probe{''.join(stages)}", run, [*frames, *stages], beside, seed)
                                     for seed in seeds for stages in ("234", "4")))

    places = ["--task", "correspondence", "--count", "400"]

    def matches(run, beside):
        return row(f"matches_{run}", score("matches", run, places, beside))

    def segment(method, first, seed, share):
        start = method if method == "random" else f"{method}_s{first}"
        run, tool = f"{out}/seg/{start}_{share}_e{seed}", ["tools/finetune_seg.py", "-c", "configs/seg/fcn_r18_camvid_cpu.yml"]
        shared = ["--dataset_root", f"{data}/camvid", "--num_workers", "0"]
        return Row(f"seg_{share}_{start}_e{seed}", [
            [*tool, "train", *shared, "--save_dir", run, "--seed", str(seed), "--no_eval", "--save_interval", "300",
             "--opts", f"train_dataset.train_path={out}/camvid_{share}.txt",
             *([] if start == "random" else ["--pretrained", f"{out}/{start}/seg.pdparams"])],
            [*tool, "eval", *shared, "--model_path", f"{run}/iter_300/model.pdparams"]])

    def detect(method, first, seed):
        start = method if method == "random" else f"{method}_s{first}"
        return Row(f"det_{start}_e{seed}", [[
            "tools/finetune_det.py", "-c", "configs/det/faster_rcnn_r18_bccd_cpu.yml", "train", "-o", f"seed={seed}", "worker_num=0",
            *(f"{part}Dataset.dataset_dir={data}/bccd_voc" for part in ("Train", "Eval")), f"save_dir={out}/det/{start}_e{seed}",
            *([] if start == "random" else [f"pretrain_weights={out}/{start}/det.pdparams"])]])

    mains = [f"{method}_s{seed}" for seed in pretrained for method in METHODS]
    if part == "pretrain":
        return [train(f"{method}_s{seed}", seed, more) for seed in pretrained for method, more in METHODS.items()]
    if part == "ablations":
        return [train(f"short_{name}", 0, [f"optim.epochs={SHORT}", *more]) for name, more in ABLATIONS.items()]
    if part == "export":
        return [Row(f"export_{to}_{run}", [["tools/export_finetune.py", f"{out}/{run}/latest", "--to", f"paddle{to}", "--out",
                                            f"{out}/{run}/{to}.pdparams"]]) for run in mains for to in ("seg", "det")]
    if part == "probe":
        return [linear(f"{method}_s{first}", method == "densecl", [seed for other, seed in pairs if other == first])
                for first in dict(pairs) for method in METHODS]
    if part == "few":
        return [look(f"short_{name}", name == "base") for name in ABLATIONS for look in (linear, matches)]
    if part == "matches":
        return [matches(run, run.startswith("densecl")) for run in mains]
    if part == "retrieval":
        unseen = ["-o", f"data.list_file={out}/unseen.txt", f"data.root={data}"]
        return [row(f"retrieval_{run}", *(
            score(f"retrieval_{what}", run, ["--task", "retrieval", "--count", count, *where], run.startswith("densecl"))
            for what, count, where in (("photos", "600", []), ("camvid", "233", unseen)))) for run in mains]
    if part == "controls":
        run = f"densecl_s{pretrained[0]}"
        return [row(f"control_{kind}_{run}", score(f"control_{kind}", run, [*options, "--shuffle-labels"], True))
                for kind, options in (("probe4", [*frames, "4", "--epochs", "1"]), ("matches", places),
                                      ("retrieval", ["--task", "retrieval", "--count", "600"]))]
    if part == "seg":
        return [segment(method, first, seed, share)
                for first, seed in pairs for share in LABELS for method in ("random", *METHODS)]
    if part == "det":
        return [detect(method, first, seed) for first, seed in pairs for method in ("random", *METHODS)]
    if part == "predict":
        first, seed = pairs[0]
        starts = {"random": "random", **{method: f"{method}_s{first}" for method in METHODS}}
        masks = {method: f"{out}/masks/{start}" for method, start in starts.items()}
        return [Row("predict", [
            *(["tools/finetune_seg.py", "-c", "configs/seg/fcn_r18_camvid_cpu.yml", "predict", "--image_path",
               f"{data}/camvid/images/test", "--save_dir", masks[method],
               "--model_path", f"{out}/seg/{start}_100_e{seed}/iter_300/model.pdparams"] for method, start in starts.items()),
            ["benchmarks/side_by_side.py", "--list", f"{data}/camvid/test.txt", "--classes", f"{data}/camvid/labels.txt", "--out",
             f"{out}/masks.png", *(f"{NAMES[method]}={masks[method]}" for method in starts)]])]
    raise SystemExit(f"error: {part} is no part of the experiment; see --help")


def lists(data, out):
    """Writes the lists of pictures that the rows name."""
    camvid = {part: (data / f"camvid/{part}.txt").read_text().splitlines() for part in ("train", "test")}
    pictures = {part: [f"camvid/{line.split()[0]}" for line in lines] for part, lines in camvid.items()}
    photos = sorted(f"photos/images/{path.name}" for path in (data / "photos/images").glob("*.jpg"))
    texts = {"unlabelled": photos + pictures["train"], "unseen": pictures["test"],
             **{f"camvid_{share}": [" ".join(f"{data}/camvid/{name}" for name in line.split())
                                    for line in camvid["train"][::step]] for share, step in LABELS.items()}}
    for name, lines in texts.items():
        (out / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def _whole(result, command):
    """tools/eval.py writes what it has before it scores the random start."""
    if not result.exists():
        return False
    return command[0] != "tools/eval.py" or "--no-random" in command or "random" in json.loads(result.read_text())


def run(row, out):
    """Runs a row that has no result yet. Returns an error's sentence or None."""
    done = out / "scores" / f"{row.name}.json"
    results = list(map(Path, row.results or [done] * len(row.commands)))
    if all(map(_whole, results, row.commands)):
        return None
    started, log = time.monotonic(), out / "logs" / f"{row.name}.log"
    environment = {**os.environ, "PPDENSECL_CPU_THREADS": "1"}
    with open(log, "a") as file:
        for command, result in zip(row.commands, results):
            if _whole(result, command):
                continue
            file.write(f"$ python {shlex.join(command)}\n")
            file.flush()
            status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
            if status:
                return f"{row.name} ended with status {status}, see {log}"
    seconds = round(time.monotonic() - started, 1)
    if row.results is None:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1]
        done.with_suffix(".tmp").write_text(json.dumps({"line": last, "seconds": seconds, "commands": row.commands}, indent=1))
        os.replace(done.with_suffix(".tmp"), done)
    print(f"{row.name}: {seconds:.0f} s", flush=True)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "output/evidence")
    parser.add_argument("--print", action="store_true", help="show the commands and end")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--pretrained", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="of the pre-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="of the evaluation")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    chosen = [row for part in arguments.parts for row in rows(part, data, out, arguments.pretrained, arguments.seeds)]
    if arguments.print:
        for row in chosen:
            print("\n".join(f"python {shlex.join(map(str, command))}" for command in row.commands))
        return
    for folder in ("logs", "scores"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lists(data, out)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [sentence for sentence in pool.map(lambda row: run(row, out), chosen) if sentence]
    if failed:
        sys.exit("error: " + "; ".join(failed))


if __name__ == "__main__":
    main()
