"""Damaged and hostile files by the thousand: config files, pictures, weights.

    python tests/reliability/fuzz.py --inputs 5000             all three
    python tests/reliability/fuzz.py --kinds pictures --inputs 5000 --seed 7

Every input is refused with one sentence or accepted as what it should be, in bounded time and memory, and runs nothing. The
input at work lies in the folder that is printed when that fails, and a watchdog ends the process where one takes too long.
"""

import argparse
import faulthandler
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOG_minloglevel", "2")

import numpy as np  # noqa: E402
from hostile_files import (  # noqa: E402
    WORDS, asking, hostile_yaml, jpeg_of_another_size, mutate, override, picture_files, png_again, rezip, tower, weight_files)

from ppdensecl.config import Config, load_config  # noqa: E402
from ppdensecl.data.picture import MAX_PIXELS, UndecodableError, decode  # noqa: E402
from ppdensecl.engine import checkpoint  # noqa: E402
from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.interop import foreign, torch_file  # noqa: E402

WATCHDOG = 60  # seconds for one input; what is allowed is less, see LIMITS
LIMITS = {"configs": (10, 500), "pictures": (30, 2600), "weights": (10, 1000)}  # seconds for one input, MB more than before


def one_sentence(error, longest=3000):
    text = str(error)
    assert text and "\n" not in text and len(text) < longest, f"{len(text)} characters: {text[:300]!r}"


# Configs

def configs(folder, rng, count):
    """Yields (name of the input, what to do with it)."""
    shipped = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
    for name, text in shipped.items():
        (folder / name).write_text(text)
    dumped = Config().to_yaml()
    bases = [text.encode() for text in (*shipped.values(), dumped)]
    for number in range(count):
        data, overrides = rng.choice(bases), []
        kind = number % 5
        if kind == 0:
            data = mutate(data, rng, [*bases, *(word.encode("utf-8", "surrogatepass") for word in WORDS)])
        elif kind == 1:  # values exchanged
            lines = data.decode().splitlines()
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(lines))
                lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(WORDS)
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        elif kind == 2:
            overrides = [override(rng) for _ in range(rng.randrange(1, 4))]
        elif kind == 3:
            data = hostile_yaml(rng, folder).encode("utf-8", "surrogatepass")
        else:
            data = rng.choice((b"", b"\xef\xbb\xbf", b"\xff\xfe", b"a: ")) + rng.getrandbits(8 * 40).to_bytes(40, "big")
        (folder / "input.yaml").write_bytes(data)
        yield lambda: load_config(folder / "input.yaml", overrides).to_yaml()


# Pictures

def pictures(folder, rng, count):
    files = list(picture_files())
    for number in range(count):
        kind, data = files[number % len(files)]
        if kind == "PNG" and rng.random() < 0.5:
            data = png_again(data, rng)
        elif kind == "JPEG" and rng.random() < 0.2:
            data = jpeg_of_another_size(data, rng)
        else:
            data = mutate(data, rng, [other for _, other in files])
        (folder / "input").write_bytes(data)
        yield lambda: check_pixels(decode(data, "a picture"))


def check_pixels(pixels):
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS, pixels.shape
    pixels.max()  # its memory is there


# Weights

def weights(folder, rng, count):
    (folder / "good").mkdir()
    files, trace = weight_files(folder / "good"), folder / "trace"
    readers = (torch_file.read, checkpoint.read_arrays, checkpoint.read_nested, foreign.read)
    for number in range(count):
        name = list(files)[number % len(files)]
        data, kind = files[name], rng.randrange(8)
        suffix = Path(name).suffix
        if suffix == ".pdstates" and kind < 5:  # with correct checksums
            states = json.loads(data)
            values = (None, [], {}, "x", -1, 1e300, [[]], {"../x": "y"}, {"": ""}, {".pdparams": None})
            states[rng.choice(list(states))] = rng.choice(values)
            states["checksum"] = checkpoint._checksum(states)
            data = json.dumps(states).encode()
        elif suffix in (".pdparams", ".pdopt", ".pth") and kind < 4:
            hostile = [lambda _: asking(rng, trace), lambda _: tower(rng)][kind % 2]
            data = rezip(data, rng, hostile) if name == "zip.pth" else hostile(data)
        elif name == "zip.pth" and kind < 6:
            data = rezip(data, rng, lambda body: mutate(body, rng, list(files.values())))
        else:
            data = mutate(data, rng, list(files.values()))
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        if suffix == ".pdstates":
            for other in (".pdparams", ".pdopt"):
                (folder / f"input{other}").write_bytes(files[f"whole{other}"])
            yield lambda: read_states(path)
        else:
            (folder / "input.pdstates").unlink(missing_ok=True)
            yield lambda: read_by_each(readers, path)
        assert not trace.exists(), "the file ran something"


def read_states(path):
    states = checkpoint.verify(path)
    assert isinstance(states, dict)
    checkpoint.newest(path.parent)
    foreign.read(str(path.with_suffix("")))


def read_by_each(readers, path):
    """Every reader gets every file; it counts as refused where all refuse it."""
    refused = []
    for reader in readers:
        try:
            pickle.dumps(reader(str(path)))  # touches every byte
        except UserError as error:
            one_sentence(error)
            refused.append(error)
    if len(refused) == len(readers):
        raise refused[0]


reading = []  # [True] while an input is read


def forbid(event, arguments):
    if not any(reading):
        return
    names = ("os.system", "subprocess.Popen", "exec", "compile", "pickle.find_class", "os.posix_spawn", "os.exec", "os.fork",
             "shutil.rmtree", "ctypes.dlopen")
    if event in names or (event == "import" and arguments[0] in ("antigravity", "this", "pty", "runpy", "torch")):
        os.write(2, f"forbidden: {event} {arguments}\n".encode())
        os._exit(3)


def run(kind, count, seed, folder):
    """{inputs, accepted, refused, slowest in s of CPU time, memory in MB}. Any other exception than a refusal is a finding."""
    make, rng = {"configs": configs, "pictures": pictures, "weights": weights}[kind], random.Random(seed)
    for warm in make(Path(tempfile.mkdtemp(dir=folder)), random.Random(-1), 60):  # what is imported on demand
        attempt(warm, guarded=False)
    before, slowest, counts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (0, 0), [0, 0]
    for number, action in enumerate(make(Path(tempfile.mkdtemp(dir=folder)), rng, count)):
        started = time.process_time()  # what other programs take does not count
        counts[attempt(action)] += 1
        slowest = max(slowest, (time.process_time() - started, number))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return {"kind": kind, "inputs": count, "accepted": counts[1], "refused": counts[0], "slowest_s": round(slowest[0], 2),
            "slowest_input": slowest[1], "memory_mb": memory}


def attempt(action, guarded=True):
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    reading.append(guarded)
    try:
        action()
        return True
    except (UserError, UndecodableError) as error:
        one_sentence(error)
        return False
    finally:
        reading.clear()
        faulthandler.cancel_dump_traceback_later()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--inputs", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, bad = tempfile.mkdtemp(prefix="ppdensecl_fuzz_"), False
    sys.addaudithook(forbid)
    for kind in arguments.kinds:
        try:
            result = run(kind, arguments.inputs, arguments.seed, folder)
        except BaseException:
            print(f"the input is in {folder}", file=sys.stderr)
            raise
        print(json.dumps(result), flush=True)
        seconds, megabytes = LIMITS[kind]
        bad |= result["slowest_s"] > seconds or result["memory_mb"] > megabytes
    shutil.rmtree(folder)
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
