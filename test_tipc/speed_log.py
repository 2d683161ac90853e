"""The speed and the last loss that a training log tells, as the JSON of Paddle's benchmarks. For benchmark_train.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import command_line  # noqa: E402

from ppdensecl.errors import UserError  # noqa: E402

WARM_UP = 2  # log lines that do not count


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("log", metavar="LOG", help="with a line for each iteration")
    for option in ("output", "model-name", "fp-item", "run-mode", "device-num", "model-run-time"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="of a card")
    arguments = parser.parse_args()
    try:
        text = Path(arguments.log).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{arguments.log}: cannot be read ({error.strerror})") from None
    found = re.findall(r"\bloss: ([-+.\d]+).*ips: ([.\d]+)", text)
    if len(found) <= WARM_UP:
        raise UserError(f"{arguments.log}: has {len(found)} lines with loss and ips, expected more than {WARM_UP}; raise `epoch` "
                        "of the config")
    speeds = [float(speed) for _, speed in found[WARM_UP:]]
    import ppdensecl  # noqa: F401 (Pillow before paddle)
    import paddle

    result = {"model_branch": git("rev-parse", "--abbrev-ref", "HEAD"), "model_commit": git("rev-parse", "HEAD"),
              "model_name": arguments.model_name, "batch_size": arguments.batch_size, "fp_item": arguments.fp_item,
              "run_mode": arguments.run_mode, "convergence_value": float(found[-1][0]), "convergence_key": "loss:",
              "ips": round(sum(speeds) / len(speeds), 3), "speed_unit": "images/s", "device_num": arguments.device_num,
              "model_run_time": arguments.model_run_time, "frame_commit": paddle.version.commit,
              "frame_version": paddle.__version__}
    temporary = f"{arguments.output}.tmp{os.getpid()}"
    try:
        Path(temporary).write_text(json.dumps(result) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.output)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"{arguments.output}: {result['ips']} images/s of all cards, mean of {len(speeds)} iterations")


def git(*words):
    """What git says of this clone; nothing outside of one."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    command_line.run(main)
