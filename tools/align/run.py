"""Proves that ours computes what PyTorch computes: python tools/align/run.py --out output/align

Builds the method in Paddle (ppdensecl) and in PyTorch (reference.py), gives both the same weights and views, and compares in
float32 and float64: forward, matches, losses, gradients, optimizer, BatchNorm statistics, queues, 20 steps, variants, two
processes with shuffling BN, learning rates, augmentations, initialisation. Exit status 1 when a row is outside its tolerance.
"""

import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import command_line  # noqa: E402

CHECKS = ("pictures", "schedule", "start", "one_step", "variants", "twenty_steps", "two_processes")


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("--out", required=True, help="folder for table.md, table.json, the plot and reprod-log's files")
    parser.add_argument("--pictures", help="folder of pictures for the augmentations (default: procedural scenes)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}")
    arguments = parser.parse_args()
    from ppdensecl.errors import UserError

    missing = [name for name in ("torch", "reprod_log") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install torch==2.13.0 reprod-log==1.0.1 "
                        "--extra-index-url https://download.pytorch.org/whl/cpu (Python 3.10 or newer)")
    folder = Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from None
    from ppdensecl.engine import device

    device.select("cpu")
    import compare
    import model_checks
    import paddle
    import pictures
    import schedule_and_start
    import torch

    torch.set_num_threads(device.threads())
    checks = {name: getattr(model_checks, name, None) for name in CHECKS}
    checks.update(pictures=lambda _: pictures.rows(pictures.open_pictures(arguments.pictures)),
                  schedule=lambda _: schedule_and_start.learning_rates(), start=lambda _: schedule_and_start.initialisation())
    rows, begin = [], time.time()
    for name in CHECKS:
        if name in arguments.only:
            since = time.time()
            new = checks[name](folder)
            rows += new
            failed = [row for row in new if not row.passed]
            print(f"{name}: {len(new)} rows, {len(failed)} outside their tolerance, {time.time() - since:.0f} s", flush=True)
            for row in failed[:20]:
                print(f"  {row.check}, {row.name}, {row.dtype}: {row.largest:.2e} > {row.tolerance:.2e} {row.why}", flush=True)
    header = {"paddle": paddle.__version__, "torch": torch.__version__, "seconds": round(time.time() - begin)}
    summary = compare.write_table(folder, rows, header)
    failed = sum(not row.passed for row in rows)
    print(f"\n{summary}\n{len(rows)} rows, {failed} outside their tolerance; every row in {folder / 'table.md'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command_line.run(main)
