"""PyTorch and safetensors files: read exactly and written readably. (`test_hostile_pickles.py`: refused without harm.)

`data/torch_small_zip.pth` and `data/torch_small_legacy.pth` were made by PyTorch 2.13.0 on little-endian x86-64:

    import collections, numpy, torch
    base = torch.arange(24.).reshape(2, 3, 4) / 7
    state = collections.OrderedDict(
        whole=base, turned=base.permute(2, 0, 1)[1:], expanded=base[1, 0, :1].expand(3), scalar=base[1, 2, 3],
        empty=torch.zeros(0, 5), count=torch.tensor(7), wide=torch.tensor([1.5, -0.1]).bfloat16(),
        mask=torch.tensor([True, False, True]), weight=torch.nn.Parameter(base[0, :2].half()))
    state._metadata = collections.OrderedDict(version=1)
    content = {"epoch": 20, "loss": numpy.float64(0.5), "state_dict": state}
    torch.save(content, "torch_small_zip.pth")
    torch.save(content, "torch_small_legacy.pth", _use_new_zipfile_serialization=False)

The checks against the authors' own checkpoints need PPDENSECL_TEST_GOLDEN, a folder with `ckpt/r18s2_*`.
"""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import read_safetensors_metadata
from ppdensecl.interop.torch_file import read, read_safetensors, write, write_safetensors

DATA = Path(__file__).parent / "data"
SMALL = {"zip": DATA / "torch_small_zip.pth", "legacy": DATA / "torch_small_legacy.pth"}
TYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "complex128"]


# A hand-written torch.save, so that everything is tested where there is no PyTorch.

def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def name(full):
    return "c{}\n{}\n".format(*full.rsplit(".", 1)).encode()


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    return name(function) + group(*arguments) + b"R"


def storage(kind, key, count, *view):
    return group(plain("storage"), name(kind), plain(key), plain("cpu"), plain(count), *map(plain, view)) + b"Q"


def tensor(stored, offset, size, stride, *more):
    return call("torch._utils._rebuild_tensor_v2", stored, *map(plain, (offset, size, stride, False)),
                call("collections.OrderedDict"), *map(plain, more))


def mapping(**values):
    return b"}(" + b"".join(plain(key) + value for key, value in values.items()) + b"u"


def save_zip(path, body, storages=(), compress=zipfile.ZIP_STORED, protocol=2, **records):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("any/data.pkl", b"\x80" + bytes([protocol]) + body + b".")
        for key, _, data in storages:
            archive.writestr(f"any/data/{key}", data)
        for key, data in records.items():
            archive.writestr(f"any/{key}", data)
    return path


def save_legacy(path, body, storages=(), protocol=2, **_):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    tail = [pickle.dumps([key for key, _, _ in storages], 2)] + [struct.pack("<q", n) + d for _, n, d in storages]
    path.write_bytes(b"".join([*head, b"\x80", bytes([protocol]), body, b".", *tail]))
    return path


SAVERS = {"zip": save_zip, "legacy": save_legacy}
both = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
FLOATS = ("0", 6, np.arange(6, dtype="<f4").tobytes())  # one storage: key, count, bytes


def same(a, b):
    """Equal type, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < len(str(path)) + 400, text
    assert all(word in text for word in words), text
    return text


# Reading what PyTorch wrote

@pytest.mark.parametrize("kind", SMALL)
def test_small_file_of_pytorch(kind):
    content = read(SMALL[kind])
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / np.float32(7)
    expected = dict(whole=base, turned=base.transpose(2, 0, 1)[1:], expanded=np.full(3, base[1, 0, 0]),
                    scalar=base[1, 2, 3].reshape(()), empty=np.zeros((0, 5), np.float32), count=np.array(7),
                    wide=np.array([1.5, -0.10009765625], np.float32), mask=np.array([True, False, True]),
                    weight=base[0, :2].astype(np.float16))
    assert (content["epoch"], content["loss"]) == (20, 0.5)
    assert list(content["state_dict"]) == list(expected)
    for key, value in content["state_dict"].items():
        assert same(value, expected[key]) and value.flags.c_contiguous, key
    assert np.shares_memory(content["state_dict"]["whole"], content["state_dict"]["scalar"])


def golden():
    folder = os.environ.get("PPDENSECL_TEST_GOLDEN")
    if not folder or not (Path(folder) / "ckpt").is_dir():
        pytest.skip("PPDENSECL_TEST_GOLDEN does not name a folder with ckpt/")
    return Path(folder) / "ckpt"


def test_authors_checkpoint():
    content, listed = read(golden() / "r18s2_epoch_20.pth"), json.loads((golden() / "r18s2_epoch_20.json").read_text())
    assert list(content) == listed["top_level"] and list(content["meta"]) == list(listed["meta"])
    assert list(content["state_dict"]) == list(listed["state_dict"])
    for key, (shape, dtype, norm) in listed["state_dict"].items():
        array = content["state_dict"][key]
        assert list(array.shape) == shape and f"torch.{array.dtype}" == dtype, key
        if norm is not None:
            assert abs(np.linalg.norm(array.astype(np.float64).ravel()) - norm) <= 1e-6 * norm, key
    assert len(content["optimizer"]["state"]) == listed["optimizer_state_len"]


def test_both_formats_of_the_extracted_backbone_agree():
    new, old = read(golden() / "r18s2_extracted.pth"), read(golden() / "r18s2_extracted_legacy.pth")
    whole = read(golden() / "r18s2_epoch_20.pth")["state_dict"]
    assert list(new) == list(old) and list(new["state_dict"]) == list(old["state_dict"])
    assert len(new["state_dict"]) == 60
    for key, value in new["state_dict"].items():
        assert same(value, old["state_dict"][key]) and same(value, whole["backbone." + key]), key


# Reading what the test wrote by hand

@both
def test_layouts(save, tmp_path):
    floats = storage("torch.FloatStorage", "0", 6, *([None] if save is save_legacy else []))
    content = read(save(tmp_path / "a", mapping(
        rows=tensor(floats, 0, (2, 3), (3, 1)), columns=tensor(floats, 1, (2, 2), (1, 3)),
        steps=tensor(floats, 1, (2,), (3,)), repeated=tensor(floats, 5, (3, 2), (0, 0)), one=tensor(floats, 5, (), ()),
        thin=tensor(floats, 5, (1, 1), (2**62, 7)), none=tensor(floats, 6, (0, 3), (3, 1)),
        old=call("torch._utils._rebuild_tensor", floats, plain(4), plain((2,)), plain((1,))),
        parameter=call("torch._utils._rebuild_parameter", tensor(floats, 3, (1,), (1,)), plain(True), plain(None)),
    ), [FLOATS]))
    expected = dict(rows=[[0, 1, 2], [3, 4, 5]], columns=[[1, 4], [2, 5]], steps=[1, 4], repeated=[[5, 5]] * 3, one=5,
                    thin=[[5]], none=np.zeros((0, 3)), old=[4, 5], parameter=[3])
    for key, value in expected.items():
        assert same(content[key], np.array(value, np.float32)) and content[key].flags.c_contiguous, key
    content["rows"][1, 2] = 9
    assert content["one"] == 9 and content["columns"][1, 1] == 5


def test_view_of_a_legacy_storage(tmp_path):
    part = storage("torch.FloatStorage", "0", 6, ("part", 2, 3))
    assert read(save_legacy(tmp_path / "a", mapping(x=tensor(part, 1, (2,), (1,))), [FLOATS]))["x"].tolist() == [3, 4]
    refused(save_legacy(tmp_path / "b", mapping(x=tensor(part, 1, (3,), (1,))), [FLOATS]), "(3,)", "16 bytes", "12")
    part = storage("torch.FloatStorage", "0", 6, ("part", 4, 3))
    refused(save_legacy(tmp_path / "c", mapping(x=tensor(part, 0, (1,), (1,))), [FLOATS]), "28 bytes", "has 24")


@both
def test_number_types(save, tmp_path):
    kinds = dict(Bool="?", Byte="u1", Char="i1", Short="i2", Int="i4", Long="i8", Half="f2", Float="f4", Double="f8",
                 ComplexFloat="c8", ComplexDouble="c16")
    stored = {kind: np.array([0, 1, 3]).astype("<" + code) for kind, code in kinds.items()}
    view = [None] if save is save_legacy else []
    body = mapping(**{kind: tensor(storage(f"torch.{kind}Storage", kind, 3, *view), 0, (3,), (1,)) for kind in kinds},
                   conjugate=tensor(storage("torch.ComplexFloatStorage", "z", 1, *view), 0, (), (), {"conj": True}),
                   wide=tensor(storage("torch.BFloat16Storage", "w", 4, *view), 1, (3,), (1,)),
                   wide_turned=tensor(storage("torch.BFloat16Storage", "w", 4, *view), 0, (2, 2), (1, 2)),
                   strange=tensor(storage("torch.BoolStorage", "s", 2, *view), 0, (2,), (1,)),
                   unsigned=call("torch._utils._rebuild_tensor_v3",
                                 storage("torch.storage.UntypedStorage", "u", 4, *view),
                                 *map(plain, (1, (1,), (1,), False, None)), name("torch.uint16")))
    content = read(save(tmp_path / "a", body, [
        *((kind, 3, array.tobytes()) for kind, array in stored.items()), ("z", 1, np.array([1 + 2j], "<c8").tobytes()),
        ("w", 4, struct.pack("<4H", 0, 0x7F80, 0x8001, 0x3F81)), ("s", 2, b"\x02\x00"), ("u", 4, b"\0\0\xfe\xff")]))
    for kind, array in stored.items():
        assert same(content[kind], array), kind
    assert content["conjugate"] == 1 - 2j
    assert content["wide"].view(np.uint32).tolist() == [0x7F800000, 0x80010000, 0x3F810000]
    assert content["wide_turned"].flags.c_contiguous
    assert content["wide_turned"].view(np.uint32).tolist() == [[0, 0x80010000], [0x7F800000, 0x3F810000]]
    assert content["strange"].tobytes() == b"\1\0"
    assert same(content["unsigned"], np.array([65534], np.uint16))


def test_big_endian_and_missing_checksums(tmp_path):
    body = mapping(x=tensor(storage("torch.ShortStorage", "0", 2), 0, (2,), (1,)))
    path = save_zip(tmp_path / "a", body, [("0", 2, b"\0\1\0\2")], byteorder=b"big")
    assert same(read(path)["x"], np.array([1, 2], np.int16))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry, checksum = archive.getinfo("any/data/0"), struct.pack("<I", archive.getinfo("any/data/0").CRC)
    assert data.count(checksum) == 2  # in the record's header and in the directory
    path.write_bytes(data.replace(checksum, bytes(4)))
    assert read(path)["x"].tolist() == [1, 2]
    path.write_bytes(data.replace(checksum, b"\1\2\3\4"))
    refused(path, "CRC", entry.filename)


@both
def test_plain_values(save, tmp_path):
    values = {"list": [1, 2.5, None, True, "é", b"\xff\0", b"", 10**30, -3], "set": {1}, "frozen": frozenset("a"),
              3: (), "complex": 1 - 2j, (1, "a"): {"x": {}}, "scalar": np.float32(0.25), "flag": np.bool_(True)}
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    for protocol in range(5):
        body = pickle.dumps({**values, "array": array}, protocol)
        body = (body[2:] if protocol >= 2 else body)[:-1]
        content = read(save(tmp_path / f"{protocol}", body, protocol=protocol))
        assert same(content.pop("array"), array) and content == values
        assert same(content["scalar"], values["scalar"]) and type(content["list"][3]) is bool
    content = read(save(tmp_path / "torch", mapping(
        size=call("torch.Size", plain([2, 3])), device=call("torch.device", plain("cuda"), plain(1)),
        dtype=name("torch.bfloat16"), counter=call("collections.Counter", plain({"a": 1})),
        ordered=call("collections.OrderedDict", plain([["b", 1], ["a", 2]])),
        default=call("collections.defaultdict", name("__builtin__.list"), plain({})),
        new=call("numpy._core.multiarray.scalar", call("numpy.dtype", plain("f4")), plain("\0\0\0\x3f")))))
    assert content == {"size": (2, 3), "device": "cuda:1", "dtype": "torch.bfloat16", "counter": {"a": 1},
                       "ordered": {"b": 1, "a": 2}, "default": {}, "new": 0.5}


def test_checkpoint_of_python_2(tmp_path):
    def old(text):
        return b"U" + bytes([len(text)]) + text.encode("latin1")

    stored = group(old("storage"), name("torch.FloatStorage"), old("0"), old("cpu"), plain(6), plain(None)) + b"Q"
    body = call("collections.OrderedDict", b"](](" + old("x") + call(
        "torch._utils._rebuild_tensor", stored, plain(2), plain((2,)), plain((3,))) + b"ee")
    assert read(save_legacy(tmp_path / "a", body, [FLOATS]))["x"].tolist() == [2, 5]


# Writing

def everything():
    rng = np.random.default_rng(0)
    arrays = {dtype: (rng.standard_normal((3, 4, 2)) * 3).astype(dtype) for dtype in TYPES}
    extra = {"turned": arrays["float32"].T, "steps": arrays["int64"][::-2, 1:], "zero": np.array(2.5),
             "empty": np.zeros((0, 3), np.float32), "swapped": np.arange(5, dtype=">i4"), "é": np.float32(1.5),
             "nan": np.array([0x7FC00123, 0xFF800001], np.uint32).view(np.float32)}
    return {**arrays, **extra}


def native(array):
    return np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("="))


def test_write_and_read(tmp_path):
    arrays = everything()
    write(tmp_path / "a.pth", {"state_dict": arrays, "epoch": 3, "list": [1.5, (None, "x"), True, -2**40], "none": {}})
    content = read(tmp_path / "a.pth")
    assert content["epoch"] == 3 and content["list"] == [1.5, (None, "x"), True, -2**40] and content["none"] == {}
    assert list(content["state_dict"]) == list(arrays)
    assert all(same(content["state_dict"][key], native(value)) for key, value in arrays.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]
    data = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for info in archive.infolist():
            start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
            assert start % 64 == 0 and data[start:start + info.file_size] == archive.read(info)
    write(tmp_path / "a.pth", content)  # replaces, and the same content gives the same file
    assert (tmp_path / "a.pth").read_bytes() == data


@pytest.mark.parametrize("writer", [write, write_safetensors])
def test_failed_write_leaves_what_was_there(writer, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    for bad in (np.array([None]), np.array(["x"]), np.zeros(2, "M8[s]"), object()):
        with pytest.raises(UserError, match="cannot be stored"):
            writer(path, {"good": np.zeros(3), "bad": bad})
    with pytest.raises(UserError, match="cannot be written"):
        writer(tmp_path / "missing" / "a", {"x": np.zeros(3)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        writer(path, {"x": np.zeros(3)})
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_safetensors(tmp_path):
    arrays = {key: value for key, value in everything().items() if key != "complex128"}
    arrays["big"] = np.array([2**64 - 1], np.uint64)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays, {"author": "é"})
    for content in (read(path), read_safetensors(path)):
        assert list(content) == list(arrays)
        assert all(same(content[key], native(value)) for key, value in arrays.items())
    assert read_safetensors_metadata(path) == {"author": "é"}
    with pytest.raises(UserError, match="complex128"):
        write_safetensors(path, {"x": np.zeros(1, np.complex128)})
    with pytest.raises(UserError, match="strings"):
        write_safetensors(path, {}, {"epoch": 3})
    library = pytest.importorskip("safetensors.numpy")
    theirs = library.load_file(path)
    assert all(same(theirs[key], native(value)) for key, value in arrays.items())
    library.save_file({key: native(value).copy("C") for key, value in arrays.items()}, path)
    assert all(same(value, native(arrays[key])) for key, value in read(path).items())


def header(text, data=b"", length=None):
    text = json.dumps(text).encode() if not isinstance(text, bytes) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    good = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(good).encode()
    path.write_bytes(header(good, b"\x80\x3f\0\0"))
    assert same(read(path)["x"], np.array([1, 0], np.float32))
    cases = [
        (header(good, bytes(4), 10 * len(text)), "header of"), (header(good, bytes(4), 2**63), "header of"),
        (header(good, bytes(3)), "cannot lie"), (header(good, bytes(5)), "1 bytes after"), (b"", "empty"),
        (header(b"{", b"    "), "JSONDecodeError"), (header([], b"    "), "AttributeError"),
        (header(b"[" * 50000 + b"{"), "RecursionError"),
        (header(b"{" + text[1:-1] + b"," + text[1:], bytes(4)), "twice")]
    for change, words in (
            ({"shape": [3]}, "does not fill"), ({"shape": [-2]}, "cannot lie"), ({"shape": [2.0]}, "cannot lie"),
            ({"shape": [2**70, 0]}, "cannot lie"), ({"shape": [1] * 10**5}, "cannot lie"), ({"dtype": "F8_E4M3"}, "F8"),
            ({"data_offsets": [2, 6]}, "cannot lie"), ({"data_offsets": [4, 0]}, "does not fill"),
            ({"data_offsets": [0]}, "ValueError")):
        cases.append((header({"x": {**good["x"], **change}}, bytes(4)), words))
    two = {"x": good["x"], "y": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}
    cases += [(header(two, bytes(5)), "overlap")]
    two["y"]["data_offsets"] = [5, 7]
    cases += [(header(two, bytes(7)), "gap")]
    for data, words in cases:
        path.write_bytes(data)
        refused(path, words)


# Against PyTorch itself, where it is installed

def test_torch_reads_what_was_written(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = everything()
    write(tmp_path / "a.pth", {"state_dict": arrays, "epoch": 3, "list": [1.5, (None, "x"), True, -2**40]})
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        content = torch.load(tmp_path / "a.pth", **options)
        assert content["epoch"] == 3 and content["list"] == [1.5, (None, "x"), True, -2**40]
        for key, value in arrays.items():
            assert same(content["state_dict"][key].numpy(), native(value)), key


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_writes(new, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(4, 3, 2, dtype=torch.float64) * 9
    tensors = {dtype: (base.abs() if dtype.startswith("uint") else base).to(getattr(torch, dtype))
               for dtype in [*TYPES, "uint16", "uint32", "uint64"]}
    views = {f"{key} {label}": view(value) for key, value in tensors.items() for label, view in (
        ("turned", lambda t: t.permute(2, 0, 1)), ("slice", lambda t: t[1:3, ::2, 1]), ("one", lambda t: t[3, 2, 1]),
        ("expanded", lambda t: t[:, :1, :1].expand(4, 5, 6)), ("flat", lambda t: t[2]), ("empty", lambda t: t[4:]),
        ("many", lambda t: t.reshape(2, 2, 1, 3, 2, 1)))}
    views.update(conj=tensors["complex64"].conj(), neg=torch._neg_view(tensors["float32"]),
                 parameter=torch.nn.Linear(3, 2).weight, last=base.float()[None].to(memory_format=torch.channels_last))
    everything_else = {"sd": torch.nn.BatchNorm1d(3).state_dict(), "size": base.shape, "dtype": torch.int8,
                       "device": torch.device("cpu"), "set": {1, 2}, "bytes": b"\0\xff", "np": np.arange(3)}
    for protocol in (2, 3, 4):
        torch.save({**tensors, **views, **everything_else}, tmp_path / "a.pth", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=new)
        content = read(tmp_path / "a.pth")
        for key, value in {**tensors, **views}.items():
            assert same(content[key], value.detach().resolve_conj().resolve_neg().numpy()), key
            assert content[key].flags.c_contiguous, key
        assert content["size"] == (4, 3, 2) and content["dtype"] == "torch.int8" and content["device"] == "cpu"
        assert content["set"] == {1, 2} and content["bytes"] == b"\0\xff" and content["np"].tolist() == [0, 1, 2]
        assert content["sd"]["num_batches_tracked"].shape == () and list(content["sd"])[0] == "weight"
    wide = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    torch.save({"a": wide, "b": wide[::3]}, tmp_path / "b.pth", _use_new_zipfile_serialization=new)
    content = read(tmp_path / "b.pth")
    assert (content["a"].view(np.uint32) == np.arange(65536, dtype=np.uint32) << 16).all()
    assert content["b"].tobytes() == content["a"][::3].tobytes()
    for bad, word in ((torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"), (torch.nn.Linear(1, 1), "Linear"),
                      (torch.eye(2).to_sparse(), "sparse")):
        torch.save({"x": bad}, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
        refused(tmp_path / "c.pth", word, "nothing was run")
