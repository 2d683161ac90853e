"""Compares features that infer.py wrote with those kept in test_tipc/results, picture by picture:
python test_tipc/compare_results.py --expected test_tipc/results/densecl_r18_fp32.npz test_tipc/output/densecl_r18/lite_*/*.npz"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import command_line  # noqa: E402

from ppdensecl.errors import UserError  # noqa: E402


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    parser.add_argument("--expected", required=True, metavar="FILE.npz")
    parser.add_argument("--atol", type=float, default=1e-3, help="difference that is allowed (default %(default)s)")
    parser.add_argument("--rtol", type=float, default=1e-3, help="and in parts of the expected value (default %(default)s)")
    arguments = parser.parse_args()
    expected, failed = features(arguments.expected), 0
    for path in arguments.files:
        found = features(path)
        missing = sorted(set(expected) - set(found))
        if missing:
            raise UserError(f"{path}: has no picture {missing[0]}; it should be of what prepare.sh makes for a lite chain")
        worst = {name: excess(found[name], row, arguments.atol, arguments.rtol, path) for name, row in expected.items()}
        name = max(worst, key=worst.get)
        largest = max(np.abs(found[other] - row).max() for other, row in expected.items())
        agree = worst[name] <= 0
        failed += not agree
        verdict = "agrees" if agree else f"differs (most beyond the tolerance in {name})"
        print(f"{path}: {verdict}; largest difference {largest:.1e} in {len(expected)} pictures", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(arguments.files)} files differ from {arguments.expected} by more than "
                        f"{arguments.atol} + {arguments.rtol} of the value")


def features(path):
    """{name of picture: float32 [C]}"""
    try:
        with np.load(path) as arrays:
            rows, paths = arrays["pooled"], arrays["paths"]
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise UserError(f"{path}: no pooled features can be read ({' '.join(str(error).split())[:200]}); give an .npz that "
                        "infer.py wrote") from None
    if rows.ndim != 2 or len(rows) != len(paths):
        raise UserError(f"{path}: pooled is {list(rows.shape)}, expected a row for each of {len(paths)} pictures")
    found = {}
    for name, row in zip((Path(str(whole)).name for whole in paths), rows):
        if name in found:
            raise UserError(f"{path}: has more than one picture {name}; they are compared by name, so each needs one of its own")
        found[name] = row
    return found


def excess(found, expected, atol, rtol, path):
    """How far the worst channel is beyond the tolerance; infinite for what is no number."""
    if found.shape != expected.shape:
        raise UserError(f"{path}: has {len(found)} channels, expected {len(expected)}; is it of the same model?")
    beyond = np.abs(found - expected) - (atol + rtol * np.abs(expected))
    return np.where(np.isfinite(beyond), beyond, np.inf).max()


if __name__ == "__main__":
    command_line.run(main)
