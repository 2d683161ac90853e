"""The experiment of docs/results.md: does pre-training help, and does DenseCL help more than MoCo-v2?

python benchmarks/evidence.py DATA pretrain probe --print         the commands, to read or to paste
python benchmarks/evidence.py DATA pretrain probe --jobs 2        runs those that have no result yet; start it again to go on
python benchmarks/evidence.py DATA probe --only probe_moco16_s1   one row (names as --print shows them)

DATA holds photos/images/*.jpg, camvid/ in PaddleSeg's layout and bccd_voc/ in VOC's (see docs/results.md). Parts, in this order:
pretrain, probe, matches, retrieval, controls, export, seg, det, predict; ablations, probe_ablations. A part begins when the one
before it is whole. A run is named by method, epochs and seed; with one seed go its pre-training, the random start beside it and
its fine-tuning. A command uses one CPU thread; its output goes to OUT/logs, what it found to OUT/scores: delete that to
have it again. benchmarks/evidence_tables.py makes the tables.
"""

import argparse
import json
import os
import re
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
SHORT = 16  # epochs of an ablation; its base is the DenseCL run of as many, seed 0
ABLATIONS = {
    **{f"lambda_{share}": [f"model.loss_lambda={share}"] for share in (0.1, 0.3, 0.7, 0.9)},
    **{f"matching_{kind}": [f"model.matching={kind}"] for kind in ("embedding", "random")},
    **{f"grid_{side}": [f"model.num_grid={side}"] for side in (1, 3)},
    "queue_8192": ["model.queue_len=8192"],
    "queue_8192_lambda_0": ["model.queue_len=8192", "model.loss_lambda=0"],
    "warmup_8_epochs": ["model.lambda_warmup_iters=464"],
    "views_160": ["data.image_size=160"],
    "views_160_lambda_0": ["data.image_size=160", "model.loss_lambda=0"],
}
LABELS = {"10": 10, "50": 2, "100": 1}  # share of CamVid's training labels in percent: every n-th frame of its list
SCENE = 10  # consecutive frames of a scene


class Row(NamedTuple):
    name: str
    commands: list  # one after another
    results: list = None  # the JSON that each of them writes; without, the score in the last one's output, if any, is the result


def rows(part, data, out, epochs, seeds):
    """The rows of a part, for runs of so many epochs."""
    runs = {f"{method}{epochs}_s{seed}": (method, seed) for seed in seeds for method in METHODS}
    photos = [f"data.list_file={out}/unlabelled.txt", f"data.root={data}"]
    unseen = ["-o", f"data.list_file={out}/unseen.txt", f"data.root={data}"]
    frames = ["--task", "dense", "--train-list", f"{data}/camvid/train.txt", "--test-list", f"{data}/camvid/test.txt", "--size",
              "180", "240", "--cache", f"{out}/features", "--stage"]
    places = ["--task", "correspondence", "--size", "224", "--count", "400"]

    def train(run, seed, length, more):
        return Row(f"pretrain_{run}", [["tools/train.py", "-c", CONFIG, "--processes", "1", "--resume", "-o", *photos,
                                        f"output_dir={out}/{run}", f"seed={seed}", f"optim.epochs={length}", *more]])

    def score(kind, run, length, more, beside):
        """A command of tools/eval.py, and its result; `beside`: the random start of the run's seed is scored, too."""
        path = f"{out}/scores/{kind}_{run}.json"
        return ["tools/eval.py", "-c", f"{out}/{run}/config.yaml", "--checkpoint", f"{out}/{run}/epoch_{length}", *more,
                *([] if beside else ["--no-random"]), "--out", path], path

    def row(name, *commands):
        return Row(name, *map(list, zip(*commands)))

    def linear(run, length, beside):  # one row, for both read the features of the last stage
        return row(f"probe_{run}", *(score(f"probe{''.join(stages)}", run, length, [*frames, *stages], beside)
                                     for stages in ("234", "4")))

    def matches(run, length, beside):
        return row(f"matches_{run}", score("matches_photos", run, length, places, beside),
                   score("matches_camvid", run, length, [*places[:-1], "233", *unseen], beside))

    def search(run, beside):
        scenes = ["--task", "knn", "--neighbours", "1", "--train-list", f"{out}/scenes_bank.txt", "--test-list",
                  f"{out}/scenes_query.txt", "--root", f"{data}/camvid", "--size", "112", "--cache", f"{out}/features"]
        return row(f"retrieval_{run}", *(score(f"retrieval_{what}", run, epochs, options, beside) for what, options in (
            ("photos", ["--task", "retrieval", "--count", "600"]), ("frames", ["--task", "retrieval", "--count", "233", *unseen]),
            ("scenes", scenes))))

    def segment(start, seed, share):
        run, tool = f"{out}/seg/{start}_{share}", ["tools/finetune_seg.py", "-c", "configs/seg/fcn_r18_camvid_cpu.yml"]
        shared = ["--dataset_root", f"{data}/camvid", "--num_workers", "0"]
        return Row(f"seg_{share}_{start}", [
            [*tool, "train", *shared, "--save_dir", run, "--seed", str(seed), "--no_eval", "--save_interval", "300",
             "--opts", f"train_dataset.train_path={out}/camvid_{share}.txt",
             *(["--pretrained", f"{out}/{start}/seg.pdparams"] if start in runs else [])],
            [*tool, "eval", *shared, "--model_path", f"{run}/iter_300/model.pdparams"]])

    def detect(start, seed):
        return Row(f"det_{start}", [[
            "tools/finetune_det.py", "-c", "configs/det/faster_rcnn_r18_bccd_cpu.yml", "train", "-o", f"seed={seed}", "worker_num=0",
            *(f"{part}Dataset.dataset_dir={data}/bccd_voc" for part in ("Train", "Eval")), f"save_dir={out}/det/{start}",
            *([f"pretrain_weights={out}/{start}/det.pdparams"] if start in runs else [])]])

    starts = {**{f"random_s{seed}": seed for seed in seeds}, **{run: seed for run, (_, seed) in runs.items()}}
    if part == "pretrain":
        return [train(run, seed, epochs, METHODS[method]) for run, (method, seed) in runs.items()]
    if part == "probe":
        return [linear(run, epochs, method == "densecl") for run, (method, _) in runs.items()]
    if part == "matches":
        return [matches(run, epochs, method == "densecl") for run, (method, _) in runs.items()]
    if part == "retrieval":
        return [search(run, method == "densecl") for run, (method, _) in runs.items()]
    if part == "controls":
        run = f"densecl{epochs}_s{seeds[0]}"
        return [row(f"control_{kind}", score(f"control_{kind}", run, epochs, [*options, "--shuffle-labels"], True))
                for kind, options in (("probe4", [*frames, "4"]), ("matches", places),
                                      ("retrieval", ["--task", "retrieval", "--count", "600"]))]
    if part == "export":
        return [Row(f"export_{to}_{run}", [["tools/export_finetune.py", f"{out}/{run}/epoch_{epochs}", "--to", f"paddle{to}",
                                            "--out", f"{out}/{run}/{to}.pdparams"]]) for run in runs for to in ("seg", "det")]
    if part == "seg":
        return [segment(start, seed, share) for share in LABELS for start, seed in starts.items()]
    if part == "det":
        return [detect(start, seed) for start, seed in starts.items()]
    if part == "predict":
        chosen = {"random": f"random_s{seeds[0]}", **{method: f"{method}{epochs}_s{seeds[0]}" for method in METHODS}}
        return [Row(f"predict_{epochs}", [
            *(["tools/finetune_seg.py", "-c", "configs/seg/fcn_r18_camvid_cpu.yml", "predict", "--image_path",
               f"{data}/camvid/images/test", "--save_dir", f"{out}/masks/{start}",
               "--model_path", f"{out}/seg/{start}_100/iter_300/model.pdparams"] for start in chosen.values()),
            ["benchmarks/side_by_side.py", "--list", f"{data}/camvid/test.txt", "--classes", f"{data}/camvid/labels.txt", "--out",
             f"{out}/masks_{epochs}.png", *(f"{NAMES[method]}={out}/masks/{start}" for method, start in chosen.items())]])]
    if part == "ablations":
        return [train(name, 0, SHORT, more) for name, more in ABLATIONS.items()]
    if part == "probe_ablations":
        return [look(name, SHORT, False) for name in ABLATIONS for look in (linear, matches)]
    raise SystemExit(f"error: {part} is no part of the experiment; see --help")


def lists(data, out):
    """Writes the lists of pictures that the rows name."""
    camvid = {part: (data / f"camvid/{part}.txt").read_text().splitlines() for part in ("train", "test")}
    pictures = {part: [f"camvid/{line.split()[0]}" for line in lines] for part, lines in camvid.items()}
    photos = sorted(f"photos/images/{path.name}" for path in (data / "photos/images").glob("*.jpg"))
    scenes = [f"{line.split()[0]} {number // SCENE}" for number, line in enumerate(camvid["test"])]
    texts = {"unlabelled": photos + pictures["train"], "unseen": pictures["test"],
             "scenes_bank": scenes[::2], "scenes_query": scenes[1::2],
             **{f"camvid_{share}": [" ".join(f"{data}/camvid/{name}" for name in line.split())
                                    for line in camvid["train"][::step]] for share, step in LABELS.items()}}
    for name, lines in texts.items():
        part = out / f".{name}.tmp{os.getpid()}"
        part.write_text("".join(f"{line}\n" for line in lines))
        os.replace(part, out / f"{name}.txt")  # whoever reads it meanwhile has the same lines


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
    for command, result in zip(row.commands, results):
        if _whole(result, command):
            continue
        with open(log, "a") as file:
            file.write(f"$ python {shlex.join(command)}\n")
            file.flush()
            begin = file.tell()
            status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
        if status:
            return f"{row.name} ended with status {status}, see {log}"
    seconds = round(time.monotonic() - started, 1)
    if row.results is None:
        scores = re.findall(r"mIoU [\d.]+, pixel accuracy [\d.]+|bbox: AP [\d.]+", log.read_bytes()[begin:].decode("utf-8", "replace"))
        if row.name.startswith(("seg", "det")) and not scores:
            return f"{row.name} ended without a score, see {log}"
        result = {"score": scores[-1] if scores else None, "seconds": seconds, "commands": row.commands}
        done.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
        os.replace(done.with_suffix(".tmp"), done)
    print(f"{row.name}: {seconds:.0f} s", flush=True)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "output/evidence")
    parser.add_argument("--print", action="store_true", help="show the commands and end; the lists that they name are written")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of these parts only these rows")
    parser.add_argument("--epochs", type=int, default=16, help="of the runs (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    parts = [rows(part, data, out, arguments.epochs, arguments.seeds) for part in arguments.parts]
    if arguments.only:
        unknown = set(arguments.only) - {row.name for part in parts for row in part}
        if unknown:
            parser.error(f"--only {min(unknown)}: no row of {', '.join(arguments.parts)}")
        parts = [[row for row in part if row.name in arguments.only] for part in parts]
    for folder in ("logs", "scores"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lists(data, out)
    for part in parts:
        if arguments.print:
            for row in part:
                print(f"# {row.name}")
                print("\n".join(f"PPDENSECL_CPU_THREADS=1 python {shlex.join(command)}" for command in row.commands))
            continue
        with ThreadPoolExecutor(arguments.jobs) as pool:
            failed = [sentence for sentence in pool.map(lambda row: run(row, out), part) if sentence]
        if failed:  # the next part would build on what is not there
            sys.exit("error: " + "; ".join(failed))


if __name__ == "__main__":
    main()
