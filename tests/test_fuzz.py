"""Damaged and hostile files: some hundreds of each kind here, thousands with -m slow, and by name those that once did harm."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ppdensecl.config import load_config
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop import foreign

SCRIPT = Path(__file__).resolve().parent / "reliability" / "fuzz.py"


@pytest.mark.parametrize("inputs, seconds", [(300, 300), pytest.param(2500, 3600, marks=pytest.mark.slow)])
def test_every_input_is_accepted_or_refused_in_bounded_time_and_memory_and_runs_nothing(inputs, seconds):
    done = subprocess.run([sys.executable, str(SCRIPT), "--inputs", str(inputs), "--seed", str(inputs)], capture_output=True,
                          text=True, timeout=seconds, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["kind"] for result in results] == ["configs", "pictures", "weights"]
    for result in results:
        assert result["accepted"] + result["refused"] == inputs
        # otherwise the inputs would be too tame, or nothing would get past the first check
        assert result["refused"] > inputs / 3 and result["accepted"] > inputs / 30, result


@pytest.fixture
def at_once():
    """The C code that must not be entered notices no exception: a hang ends the whole process."""
    signal.alarm(30)
    started = time.process_time()
    yield
    assert time.process_time() - started < 10
    signal.alarm(0)


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


TREE = b"K\x01" + b"2\x86" * 60  # a tuple of twice the same tuple of twice the same …


@pytest.mark.parametrize("body, words", [
    (b"}" + TREE + b"K\x01s.", "tuple as a key"), (b"}(" + TREE + b"K\x01u.", "tuple as a key"),
    (b"}" + _text("a") + b"(" + TREE + b"\x91s.", "member of a set"), (b"}" + _text("a") + TREE + b"s.", "unfold"),
    (b"}\x94" + _text("a") + b"h\0s.", "within itself"), (b"}" + _text("a\nb") + b"K\x01s.", "'a.b' is"),
    (b"}" + _text("a") + b"\x8e" + struct.pack("<Q", 2**40) + b"s.", "ends within"),
    (b"}" + _text("a") + b"cnumpy\nndarray\n(J\xff\xff\xff\xff\x85" + _text("<f4") + b"C\4\0\0\0\0tRs.", "-1"),
    (b"}" + _text("a") + b"cnumpy\nndarray\n(K\2\x85" + _text("<f4") + b"C\4\0\0\0\0tRs.", "4 bytes"),
    (b"}" + _text("a") + b"cnumpy\nndarray\n(K\1\x85" + _text("|O8") + b"C\x08\0\0\0\0\0\0\0\0tRs.", "O8"),
    (b"}" + _text("a") + b"cnumpy\nndarray\n(K\1\x85" + _text("<c8") + b"C\x08\0\0\0\0\0\0\0\0tRs.", "not an array of numbers"),
])
def test_a_pickle_that_asks_for_much_is_refused_at_once(at_once, tmp_path, body, words):
    file = tmp_path / "x.pdparams"
    file.write_bytes(b"\x80\x04" + body)
    with pytest.raises(UserError, match=words) as error:
        checkpoint.read_arrays(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(UserError):
        foreign.read(str(file))


def test_a_place_in_the_memo_costs_nothing(at_once, tmp_path):
    """Python's own reader would make a table of 2^31 places."""
    import resource

    (tmp_path / "x.pdparams").write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert checkpoint.read_arrays(tmp_path / "x.pdparams") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("digests", [[], "x", None, {"": "0"}, {"/../../dev/zero": "0"}])
def test_digests_of_other_files_are_not_computed(at_once, tmp_path, digests):
    checkpoint.save(tmp_path, "x", {"a": np.zeros(1)}, {}, {"iteration": 1}, latest=False)
    states = json.loads((tmp_path / "x.pdstates").read_text())
    states["sha256"] = digests
    states["checksum"] = checkpoint._checksum(states)
    (tmp_path / "x.pdstates").write_text(json.dumps(states))
    with pytest.raises(UserError, match="x.pdstates: damaged"):
        checkpoint.verify(tmp_path / "x")


BOMBS = {
    "sections": "model: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, 60)),
    "lists": "data:\n  root: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    "a section within itself": "model: &a\n  b: *a\n",
    "a list within itself": "seed: &a [*a]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_anchors_that_unfold_without_measure(at_once, tmp_path, name):
    (tmp_path / "x.yaml").write_text(BOMBS[name])
    with pytest.raises(UserError, match="x.yaml: an anchor contains itself or is repeated without measure"):
        load_config(tmp_path / "x.yaml")


def test_anchors_as_people_use_them(tmp_path):
    (tmp_path / "x.yaml").write_text("seed: &n 3\noptim: {epochs: *n, milestones: [*n, *n]}\n")
    config = load_config(tmp_path / "x.yaml")
    assert (config.seed, config.optim.epochs, config.optim.milestones) == (3, 3, [3, 3])


@pytest.mark.parametrize("base", ['"\\ud800.yaml"', '"\\0.yaml"', "x" * 5000, "loop.yaml"])
def test_a_base_that_no_file_can_be(tmp_path, base):
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    (tmp_path / "x.yaml").write_text(f"_base_: {base}\n")
    with pytest.raises(UserError, match="cannot read the config") as error:
        load_config(tmp_path / "x.yaml")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("override", ["a\nb", "model.x=a\nb", "optim.lr=" + "x" * 100_000, "x" * 100_000 + "=1", "seed=\x1b[2J"])
def test_an_override_of_any_text_is_refused_in_one_printable_line(tmp_path, override):
    (tmp_path / "x.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "x.yaml", [override])
    assert str(error.value).isprintable() and len(str(error.value)) <= 2003
