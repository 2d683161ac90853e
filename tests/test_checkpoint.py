import json
import os
import pickle

import numpy as np
import paddle
import pytest

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError


def _save(folder, iteration, name=None):
    arrays = {"a.weight": np.full((3, 4), iteration, "float32"), "b": np.arange(5, dtype="int64"), "scalar": np.array(2.5)}
    checkpoint.save(folder, name or f"iter_{iteration}", arrays, {"a.weight/velocity_0": np.ones((3, 4), "float32")},
                    {"iteration": iteration, "epoch": 0})
    return arrays


def test_round_trip_and_paddle_reads_it(tmp_path):
    arrays = _save(tmp_path, 7)
    for name in ("iter_7", "latest", "latest.pdparams"):
        found = checkpoint.load_weights(tmp_path / name)
        assert found.keys() == arrays.keys()
        for key in arrays:
            assert (found[key] == arrays[key]).all() and found[key].dtype == arrays[key].dtype
    loaded = paddle.load(str(tmp_path / "latest.pdparams"))
    assert (loaded["a.weight"].numpy() == arrays["a.weight"]).all()
    layer = paddle.nn.Linear(3, 4)
    layer.set_state_dict({"weight": loaded["a.weight"], "bias": paddle.zeros([4])})
    assert (layer.weight.numpy() == 7).all()
    assert checkpoint.verify(tmp_path / "latest")["iteration"] == 7
    assert not list(tmp_path.glob(".*"))


def test_the_file_names_nothing_that_another_numpy_lacks(tmp_path):
    _save(tmp_path, 1)
    data = (tmp_path / "iter_1.pdparams").read_bytes()
    assert b"_core" not in data and b"multiarray" not in data and b"numpy" in data


def test_reads_what_paddle_save_writes(tmp_path):
    layer = paddle.nn.Conv2D(2, 3, 3)
    paddle.save(layer.state_dict(), str(tmp_path / "x.pdparams"))
    found = checkpoint.read_arrays(tmp_path / "x.pdparams")
    assert found.keys() == {"weight", "bias"} and (found["weight"] == layer.weight.numpy()).all()


def test_newest_whole_one_is_found(tmp_path):
    for iteration in (5, 10, 15):
        _save(tmp_path, iteration)
    assert checkpoint.newest(tmp_path)[1]["iteration"] == 15
    file = tmp_path / "iter_15.pdparams"  # latest is a hard link of it
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    path, states, notes = checkpoint.newest(tmp_path)
    assert states["iteration"] == 10 and path.name == "iter_10" and "damaged" in notes[0]
    (tmp_path / "iter_10.pdstates").write_text("{")
    path, states, notes = checkpoint.newest(tmp_path)
    assert states["iteration"] == 5 and any("iter_10" in note for note in notes)
    (tmp_path / "iter_5.pdopt").unlink()
    with pytest.raises(UserError, match="no checkpoint here is whole"):
        checkpoint.newest(tmp_path)


def test_keep_last(tmp_path):
    for iteration in (5, 10, 15):
        _save(tmp_path, iteration)
        checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("*.pdparams")) == ["iter_10.pdparams", "iter_15.pdparams", "latest.pdparams"]
    checkpoint.prune(tmp_path, None)
    assert len(list(tmp_path.glob("*.pdstates"))) == 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    _save(tmp_path, 1, "x")
    before = (tmp_path / "x.pdparams").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="x.pdparams: cannot be written .No space left"):
        _save(tmp_path, 2, "x")
    assert (tmp_path / "x.pdparams").read_bytes() == before and not list(tmp_path.glob(".*"))


class _Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"a": p}, lambda p: {"a": np.array([p], object)}])
def test_a_file_cannot_run_code(tmp_path, wrap):
    trace, file = tmp_path / "ran", tmp_path / "x.pdparams"
    file.write_bytes(pickle.dumps(wrap(_Payload(trace))))
    with pytest.raises(UserError, match="x.pdparams: (asks for|damaged)"):
        checkpoint.read_arrays(file)
    assert not trace.exists()


@pytest.mark.parametrize("data, words", [(b"", "damaged"), (b"hello", "damaged"), (pickle.dumps([1]), "a list"),
                                         (pickle.dumps({"a": 1}), "'a' is not an array")])
def test_other_files_are_refused_in_one_sentence(tmp_path, data, words):
    (tmp_path / "x.pdparams").write_bytes(data)
    with pytest.raises(UserError, match=words):
        checkpoint.read_arrays(tmp_path / "x.pdparams")


def test_damaged_bytes_never_end_in_anything_else(tmp_path):
    _save(tmp_path, 3)
    data, rng = (tmp_path / "iter_3.pdparams").read_bytes(), np.random.default_rng(0)
    file = tmp_path / "y.pdparams"
    for trial in range(300):
        broken = bytearray(data[:rng.integers(1, len(data))] if trial % 3 == 0 else data)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(broken))] = rng.integers(256)
        file.write_bytes(broken)
        try:
            checkpoint.read_arrays(file)
        except UserError as error:
            assert "\n" not in str(error)


def test_states_are_plain_json(tmp_path):
    _save(tmp_path, 3)
    assert json.loads((tmp_path / "latest.pdstates").read_text())["iteration"] == 3
