"""Files that want to do harm, are damaged or of another kind: refused with one sentence, and nothing in them is run."""

import copyreg
import functools
import io
import json
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ppdensecl.errors import UserError
from ppdensecl.interop.torch_file import read, write_safetensors
from test_torch_file import (FLOATS, SMALL, both, call, group, mapping, name, plain, refused, save_legacy, save_zip,
                             storage, tensor)


# Files that want to do harm

class Payload:
    def __init__(self, function, *arguments, state=None):
        self.recipe = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self):
        return self.recipe


def payloads(trace):
    touch = f"open({str(trace)!r}, 'w').close()"
    shell = f"touch '{trace}'"
    system = Payload(os.system, shell)
    objects = np.empty(1, object)
    objects[0] = system
    yield "posix.system" if os.name == "posix" else "nt.system", system
    yield "subprocess.", Payload(subprocess.call, ["touch", str(trace)])
    yield "subprocess.Popen", Payload(subprocess.Popen, ["touch", str(trace)])
    yield "eval", Payload(eval, touch)
    yield "exec", Payload(exec, touch)
    yield "functools.partial", Payload(functools.partial, os.system, shell)
    yield "operator.attrgetter", Payload(operator.attrgetter("system.__call__"), os)
    yield "getattr", Payload(getattr, Payload(__import__, "os"), "system")
    yield "__import__", Payload(__import__, "os")
    yield "pickle.loads", Payload(pickle.loads, pickle.dumps(system, 2))
    yield "O8", objects
    yield "system", {"state_dict": {"a": [({"deep": system},)]}}
    yield "system", Payload(dict, state={"hook": system})
    yield "bytearray", Payload(bytearray, 10**12)


@both
def test_code_is_refused_by_name(save, tmp_path):
    trace, count = tmp_path / "trace", 0
    for asked, payload in payloads(trace):
        for protocol in range(5):
            try:
                body = pickle.dumps({"first": 1, "state_dict": payload}, protocol)
            except (pickle.PicklingError, TypeError, AttributeError):  # modules cannot be pickled: only named by hand
                continue
            body = (body[2:] if protocol >= 2 else body)[:-1]
            refused(save(tmp_path / "a", body, protocol=protocol), asked, "nothing was run")
            count += 1
    assert count > 50 and not trace.exists()
    pickle.loads(pickle.dumps(Payload(os.system, f"touch '{trace}'"), 2))
    assert trace.exists(), "the payload itself must work, or this test shows nothing"


FLOAT = storage("torch.FloatStorage", "0", 6)
TOUCH = plain("touch trace")
TREE = b")" + b"2\x86" * 70  # a tuple of twice a tuple of twice …, 70 levels deep: whoever hashes or prints it hangs
REPEATED = 200  # calls on one megabyte that the pickle holds once
CRAFTED = [  # instructions that make one value, a word of the refusal
    # Every way to name and to call something
    (name("os.system") + group(TOUCH) + b"R", "os.system"),
    (name("os.system") + group(TOUCH) + b"\x81", "os.system"),
    (b"(" + TOUCH + b"ios\nsystem\n", "os.system"),
    (b"(" + name("os.system") + TOUCH + b"o", "os.system"),
    (plain("os") + plain("system") + b"\x93" + group(TOUCH) + b"R", "os.system"),
    (name("torch.load") + group(TOUCH) + b"R", "torch.load"),
    (name("torch._utils.os.system") + group(TOUCH) + b"R", "torch._utils.os.system"),
    (name("torch._utils._rebuild_tensor_v2.__globals__.get"), "__globals__"),
    (name("torch.nn.modules.linear.Linear") + b")R", "torch.nn.modules.linear.Linear"),
    (name("torch.FloatStorage") + b")R", "calls torch.FloatStorage"),
    (plain("torch._utils._rebuild_tensor") + b")R", "calls torch._utils"),
    (plain("os.system") + group(TOUCH) + b"R", "calls os.system"),
    (plain([1]) + b")R", "calls [1]"),
    (plain({}) + b")\x81", "calls {}"),
    (b"R", ""),
    (b"\x82\x01", ""),
    # Attributes and fillings of what has none
    (call("torch.Size", plain(())) + plain(["__class__"]) + b"b", "attributes of a tuple"),
    (tensor(FLOAT, 0, (6,), (1,)) + plain({"__class__": 1}) + b"b", "attributes of a ndarray"),
    (tensor(FLOAT, 0, (6,), (1,)) + plain(7) + b"a", "fills a ndarray"),
    (tensor(FLOAT, 0, (6,), (1,)) + b"(K\0e", "fills a ndarray"),
    (tensor(FLOAT, 0, (6,), (1,)) + b"(K\0K\1u", "fills a ndarray"),
    (tensor(FLOAT, 0, (6,), (1,)) + b"K\0K\1s", "fills a ndarray"),
    (tensor(FLOAT, 0, (6,), (1,)) + b"(K\0\x90", "fills a ndarray"),
    (call("_codecs.encode", plain("x"), plain("rot13")), "rot13"),
    (call("collections.Counter", plain([[1, 2, 3]])), ""),
    # numpy
    (call("numpy.dtype", plain("O8"), plain(False), plain(True)), "O8"),
    (call("numpy.dtype", plain([("a", "O")])), "dtype"),
    (call("numpy.dtype", TREE), "dtype"),
    (call("numpy.dtype", plain("f8")) + plain((3, ">", None, None, None, -1, -1, 0)) + b"b", ">"),
    (name("numpy.core.multiarray._reconstruct") + b")R", ""),
    (call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), plain((0,)), plain("b"))
     + plain((1, (10**9,), 3, False, "1")) + b"b", "1 bytes"),
    (call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), plain((0,)), plain("b"))
     + group(plain(1), plain((9,)), call("numpy.dtype", plain("f8")), plain(False), plain("")) + b"b", "0 bytes"),
    (call("numpy.core.multiarray.scalar", call("numpy.dtype", plain("f8")), plain("1234")), "4 bytes"),
    (call("numpy.core.multiarray.scalar", plain("f8"), plain("12345678")), "scalar"),
    # Tensors that reach beyond their storage, or are none
    (tensor(FLOAT, 3, (4,), (1,)), "(4,)"),
    (tensor(FLOAT, 0, (2, 3), (4, 1)), "(2, 3)"),
    (tensor(FLOAT, 6, (), ()), "()"),
    (tensor(FLOAT, 2**62, (2**62,), (2**62,)), "bytes"),
    (tensor(FLOAT, -1, (1,), (1,)), "-1"),
    (tensor(FLOAT, 5, (3,), (-1,)), "-1"),
    (tensor(FLOAT, 0, (-1,), (1,)), "-1"),
    (tensor(FLOAT, 0, (2, 2), (1,)), "with strides"),
    (tensor(FLOAT, 0, (2.0,), (1,)), "2.0"),
    (tensor(FLOAT, 0, (1,) * 33, (1,) * 33), "32"),
    (tensor(FLOAT, 0, 6, 1), "6"),
    (tensor(FLOAT, 0, (10**9,), (0,)), "unfolds"),
    (tensor(FLOAT, 0, (2**62, 2**62), (0, 0)), ""),
    (tensor(plain("storage"), 0, (1,), (1,)), "makes a tensor of storage"),
    (call("torch._utils._rebuild_parameter", plain("x"), plain(1), plain(2)), "parameter"),
    (call("torch._utils._rebuild_tensor_v3", FLOAT, *map(plain, (0, (1,), (1,), 0, 0, "torch.int8"))), "torch.int8"),
    (name("torch.QInt8Storage"), "numpy lacks"),
    (name("torch.float8_e5m2"), "numpy lacks"),
    # Storages
    (FLOAT, "outside of a tensor"),
    (storage("torch.FloatStorage", "0", 60), ""),
    (storage("torch.DoubleStorage", "0", 10**15), ""),
    (storage("torch.FloatStorage", "0", -6), "-6"),
    (storage("torch.float32", "0", 6), "not the storage"),
    (storage("torch.storage.TypedStorage", "0", 6), "not the storage"),
    (storage("torch.FloatStorage", 0, 6), "not the storage"),
    (storage("torch.FloatStorage", "nowhere", 6), ""),
    (group(plain("module"), plain("x"), plain(""), plain(""), plain(1)) + b"Q", "not the storage"),
    (plain("0") + b"Q", "not the storage"),
    (b"P0\n", "not the storage"),
    (TREE + b"Q", "not the storage"),
    (group(call("numpy.core.multiarray.scalar", call("numpy.dtype", plain("f8")), plain("12345678")), *[plain(0)] * 4)
     + b"Q", "not the storage"),
    # Containers that never end
    (b"}" + TREE + b"Ns", "tuple as a key"),
    (b"(" + TREE + b"Nd", "tuple as a key"),
    (b"(" + TREE + b"d", "without a value"),
    (b"\x8f(" + TREE + b"\x90", "tuple as a key"),
    (b"(" + TREE + b"\x91", "tuple as a key"),
    (call("builtins.set", b"](" + TREE + b"e"), "tuple as a key"),
    (TREE, "ten million"),
    (b"]q\0h\0a", "within itself"),
    (b"}q\0K\1h\0s", "within itself"),
    (b"]" + b"\x85" * 150, "deeper"),
    (plain("x" * 10**6) + b"qc0](" + call("_codecs.encode", b"hc") * REPEATED + b"e", "many times"),
    (plain([None] * 10**5) + b"qc0](" + call("builtins.list", b"hc") * REPEATED + b"e", "many times"),
    (plain({1: 2}) + b"qc0](" + call("builtins.bytes", plain(10**12)) + b"e", ""),
    # Damage
    (b"\x8d" + struct.pack("<Q", 2**62), ""), (b"\x8b" + struct.pack("<i", 2**31 - 1), ""), (b"\x95" + b"\xff" * 8, ""),
    (b"\x96" + struct.pack("<Q", 2**40), ""), (b"\x8e" + struct.pack("<Q", 2**40), ""), (b"r\xff\xff\xff\xff", ""),
    (b"h\7", ""), (b"0" * 9, ""), (b"Iabc\n", ""), (b"S'a'\n", ""), (b"X\3\0\0\0\xff\xff\xff", "")]


@both
def test_crafted_pickles_are_refused(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (body, words) in enumerate(CRAFTED):
        content = mapping(good=tensor(FLOAT, 0, (6,), (1,)), x=body)
        refused(save(tmp_path / f"case{number}", content, [FLOATS]), words)
    assert not (tmp_path / "trace").exists()


def test_extension_codes_are_not_looked_up(tmp_path):
    copyreg.add_extension("os", "system", 77)
    try:
        refused(save_zip(tmp_path / "a", b"\x82\x4d" + group(plain(f"touch '{tmp_path / 'trace'}'")) + b"R"))
    finally:
        copyreg.remove_extension("os", "system", 77)
    assert not (tmp_path / "trace").exists()


# Files that are damaged or of another kind

def test_other_kinds_of_files(tmp_path):
    path = tmp_path / "a.pth"
    refused(path, "No such file")
    path.mkdir()
    refused(path, "regular file")
    path = tmp_path / "b.pth"
    for data, words in (
            (b"", "empty"), (b"<!DOCTYPE html><html>", "not a PyTorch"), (b"\x93NUMPY\1\0v\0{", "not a PyTorch"),
            (bytes(257) + b"ustar  \0" + bytes(300), "tar format"), (pickle.dumps({"a": 1}, 2), "torch.save"),
            (pickle.dumps(Payload(os.system, "true"), 0), "system"), (b"PK\3\4" + bytes(60), "BadZipFile")):
        path.write_bytes(data)
        refused(path, words)
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    refused(tmp_path / "c.npz", "data.pkl")
    refused(save_zip(path, mapping(), **{"constants.pkl": b""}), "TorchScript")
    refused(save_zip(path, plain([1])), "holds a list")
    refused(save_zip(path, mapping(), byteorder=b"middle"), "KeyError")
    path.write_bytes(SMALL["legacy"].read_bytes().replace(b"little_endianq\2\x88", b"little_endianq\2\x89"))
    refused(path, "big-endian")


def test_claims_larger_than_the_file(tmp_path):
    path, data = tmp_path / "a.pth", FLOATS[2]
    body = mapping(x=tensor(storage("torch.FloatStorage", "0", 60), 0, (60,), (1,)))
    refused(save_zip(path, body, [("0", 0, data)]), "24 bytes", "needs 240")
    refused(save_legacy(path, body, [("0", 60, data)]), "claims 240 bytes", "24 left")
    refused(save_legacy(path, body, [("0", 6, data)]), "two sizes")
    refused(save_legacy(path, mapping(x=b"\x8e" + struct.pack("<Q", 2**35) + b"abc")), "ends within its pickled part")
    body = mapping(x=tensor(storage("torch.FloatStorage", "0", 6), 0, (6,), (1,)))
    whole = save_legacy(path, body, [FLOATS]).read_bytes()
    for keys in (plain(["1"]), plain([0]), b"](" + TREE + b"e"):
        path.write_bytes(whole.replace(pickle.dumps(["0"], 2), b"\x80\2" + keys + b"."))
        refused(path, "belongs to no tensor")
    body = mapping(x=tensor(storage("torch.FloatStorage", "0", 2**60), 0, (60,), (1,)))
    refused(save_legacy(path, body, [("0", 2**60, data)]), "claims")
    body = mapping(**{f"x{n}": tensor(storage("torch.ByteStorage", f"{n}", 1 << 20), 0, (3,), (1,)) for n in range(9)})
    bomb = [(f"{n}", 0, bytes(1 << 20)) for n in range(9)]
    refused(save_zip(path, body, bomb, zipfile.ZIP_DEFLATED), "unpack")
    refused(save_zip(path, body, bomb, zipfile.ZIP_LZMA), "compressed")
    mild = np.random.default_rng(0).integers(0, 16, 1 << 20, dtype=np.uint8).tobytes()
    save_zip(path, body, [(key, 0, mild) for key, _, _ in bomb], zipfile.ZIP_DEFLATED)
    assert read(path)["x8"].tobytes() == mild[:3]


def bases(folder):
    """Small files of every kind, as bytes."""
    write_safetensors(folder / "base", {"a": np.arange(9.0), "b": np.zeros((2, 3), np.int8)}, {"k": "v"})
    return {"zip": SMALL["zip"].read_bytes(), "legacy": SMALL["legacy"].read_bytes(),
            "safetensors": (folder / "base").read_bytes()}


def survives(path, data):
    """`data` is refused with one sentence or read as arrays whose bytes all exist."""
    path.write_bytes(data)
    try:
        content = read(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return False
    assert type(content) is dict
    pickle.dumps(content)  # touches every byte
    return True


def test_cut_files(tmp_path):
    for kind, data in bases(tmp_path).items():
        for length in sorted(set(np.linspace(0, len(data) - 1, 100).astype(int))):
            assert not survives(tmp_path / kind, data[:length]), (kind, length)


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, kind = rng.randrange(len(data)), rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at - 20:at]
        elif kind == 4:
            data[at:at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 4, struct.pack("<q", 2**40), b"9"))
        else:
            data[at:at] = bytes([rng.choice(b"cRbQtuse.()}]2\x81\x93\x8f\x95\x86\x85hqrjJXi0do")])
        data = data or bytearray(1)
    return bytes(data)


def fuzz(folder):
    """Run in a process of its own: prints how many mutated files were read, how many refused."""
    import codecs
    import resource
    import signal
    import warnings

    warnings.simplefilter("error")
    rng, counts, files = random.Random(5), [0, 0], bases(folder)
    with zipfile.ZipFile(io.BytesIO(files["zip"])) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}

    def forbid(event, arguments):
        if event in ("os.system", "subprocess.Popen", "exec", "compile", "pickle.find_class", "os.posix_spawn"):
            os.write(2, f"{event} {arguments}".encode())  # os._exit leaves no traceback
            os._exit(3)

    for codec in ("cp437", "raw_unicode_escape"):  # which zipfile and pickle import on demand
        codecs.lookup(codec)
    for kind in files:
        survives(folder / "a", mutate(files[kind], rng))
    sys.addaudithook(forbid)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), -1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1600):
        kind = ("zip", "legacy", "safetensors", "pickle")[number % 4]
        if kind == "pickle":  # with correct checksums around it
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for key, data in records.items():
                    archive.writestr(key, mutate(data, rng) if key.endswith("data.pkl") else data)
            data = out.getvalue()
        else:
            data = mutate(files[kind], rng)
        signal.alarm(5)
        counts[survives(folder / "a", data)] += 1
    for length in range(200):
        signal.alarm(5)
        noise = rng.getrandbits(8 * length + 8).to_bytes(length + 1, "big")
        counts[survives(folder / "a", rng.choice((b"", b"\x80\2", b"PK\3\4")) + noise)] += 1
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps({"read": counts[True], "refused": counts[False], "growth_mb": growth}))


def test_mutated_files(tmp_path):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to bound the memory")
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    result = json.loads(done.stdout)
    print(result)
    assert result["read"] > 100 and result["refused"] > 800 and result["growth_mb"] < 200


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]))
