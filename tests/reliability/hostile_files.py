"""Files that do harm: texts, pictures and pickles, damaged at random or made to hang, to fill the memory or to run something.

Where a function takes a random.Random, the same random numbers give the same file.
"""

import io
import pickle
import struct
import zipfile
import zlib

from PIL import Image

import numpy as np
import paddle

from ppdensecl.config import keys
from ppdensecl.engine import checkpoint
from ppdensecl.interop import torch_file

NUMBERS = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", struct.pack("<q", 2**40), b"\xff" * 8, struct.pack(">I", 60000))


def mutate(data, rng, others=(b"",)):
    """Bits and bytes changed, cut out, doubled, set to extreme numbers, the end cut off, or a piece of another file put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        length = rng.choice((1, 2, 8, 64, 512))
        if kind < 2 and at < len(data):
            data[at] = data[at] ^ 1 << rng.randrange(8) if kind else rng.randrange(256)
        elif kind == 2:
            del data[at:at + length]
        elif kind == 3:
            data[at:at] = data[max(at - length, 0):at] * rng.choice((1, 1, 50))
        elif kind == 4:
            number = rng.choice(NUMBERS)
            data[at:at + len(number)] = number
        elif kind == 5 and rng.random() < 0.3:
            del data[at:]
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at:at + rng.choice((0, length))] = other[start:start + length]
        elif kind == 7:  # in the first bytes, where sizes are
            data[at % 64:at % 64 + 1] = bytes([rng.choice((0, 1, 127, 128, 255))])
    return bytes(data)


# Configs

WORDS = ["", " ", "~", "null", "true", "yes", "-1", "0", "1e400", "-.inf", ".nan", "1e-400", "9" * 5000, "0x10", "1_000",
         "08", "é日本", "\u202e", "[]", "{}", "[[[[]]]]", "[64, 64]", "[64, 64, 64]", "{a: b}", "!!python/name:os.system",
         "!!binary aGk=", "!!python/object/apply:os.system ['touch trace']", "!!set {a, b}", "!!timestamp 2020-01-01",
         "!!int x", "!!float []", "2020-01-01", "&a [*a]", "*a", "'unclosed", "\"\\ud800\"", "| \n  text", "<<",
         "!!omap [a: 1]", "? x", "- a", "#", "%YAML 9.9", "\0", "\t", "--- a",
         *("1", "2", "4", "0.5", "false") * 4]  # which many keys accept: what comes behind the first check has to be reached


def recursive_bases(rng, folder):
    """Files that name each other."""
    for name in "abc":
        (folder / f"{name}.yaml").write_text(f"_base_: {rng.choice('abcd')}.yaml\nseed: {rng.randrange(9)}\n")
    base = rng.choice(["a.yaml", "../" * rng.randrange(9) + "a.yaml", "./input.yaml", ".", "/dev/null", "", "a" * 5000])
    return f"_base_: {base}\n"


def hostile_yaml(rng, folder):
    depth = rng.choice((3, 30, 300, 3000))
    return rng.choice((
        lambda: recursive_bases(rng, folder),
        lambda: "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, min(depth, 30))),
        lambda: "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, min(depth, 60))),
        lambda: "seed: " + "[" * depth + "]" * rng.choice((0, depth)),
        lambda: "model: " + "{a: " * depth + "1" + "}" * depth,
        lambda: "\n".join(" " * n + f"k{n}:" for n in range(depth)),
        lambda: "&a\nmodel: *a\n",
        lambda: "model: &m {backbone: *m}\n<<: *m\n",
        lambda: f"{rng.choice(keys())}: 1\n" * 2,
        lambda: "? [a, b]\n: 1\n? {a: b}\n: 2\n",
        lambda: "".join(f"{rng.choice(WORDS)}: {rng.choice(WORDS)}\n" for _ in range(rng.randrange(1, 9))),
        lambda: "seed: " + "9" * depth * 40 + "\n"))()


def override(rng):
    key = rng.choice([*keys(), *keys(), "model", "optim.", ".", "_base_", "seed.x", "model.x.y.z", "a" * 3000, rng.choice(WORDS)])
    return key + rng.choice(("=", "=", "=", "", "==")) + rng.choice(WORDS)


# Pictures

def picture_files():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(np.kron(rng.integers(0, 256, (8, 10, 3), np.uint8), np.ones((6, 6, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"JPEG": [{}, {"progressive": True}, {"exif": exif}], "PNG": [{}, {"exif": exif}], "BMP": [{}], "PPM": [{}],
             "GIF": [{}, {"save_all": True, "append_images": [picture.rotate(90)]}],
             "WEBP": [{}, {"lossless": True, "exif": exif}],
             "TIFF": [{}, *({"compression": name} for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate"))], "JPEG2000": [{}]}
    for kind, variants in kinds.items():
        for options in variants:
            for mode in ("RGB", "L", "P", "CMYK", "1", "RGBA", "I;16"):
                buffer = io.BytesIO()
                try:
                    picture.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind, **options)
                except (OSError, ValueError):  # a mode that the format lacks
                    continue
                yield kind, buffer.getvalue()


def png_again(data, rng):
    """A PNG whose chunks are mutated, doubled, exchanged or left out, each with a correct checksum."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    for _ in range(rng.randrange(1, 4)):
        at, kind = rng.randrange(len(chunks)), rng.randrange(4)
        if kind == 0:
            chunks[at] = chunks[at][0], mutate(chunks[at][1], rng)
        elif kind == 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[at])
        elif kind == 2 and len(chunks) > 1:
            del chunks[at]
        else:
            header = bytearray(chunks[0][1])
            header[:8] = struct.pack(">II", *(rng.choice((0, 1, 48, 13000, 2**16, 2**31 - 1, 2**32 - 1)) for _ in "wh"))
            chunks[0] = chunks[0][0], bytes(header)
    return data[:8] + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                               for kind, body in chunks)


def jpeg_of_another_size(data, rng):
    at = next((at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(marker)) > 0), 0)
    size = struct.pack(">HH", *(rng.choice((0, 1, 8, 480, 4000, 13000, 65500, 65535)) for _ in "hw"))
    return data[:at + 5] + size + data[at + 9:]


# Weights

def weight_files(folder):
    """{suffix: bytes} of small files of every kind, as what writes them makes them."""
    paddle.seed(0)
    layer = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4))
    state = {name: value.numpy() for name, value in layer.state_dict().items()}
    arrays = {"encoder_q.backbone.conv1.weight": state["0.weight"], "queue.keys": np.eye(3, dtype=np.float32)}
    checkpoint.save(folder, "whole", arrays, {"encoder_q.backbone.conv1.weight/velocity_0": state["0.weight"]},
                    {"iteration": 3, "epoch": 1, "config": {"model": {}}}, latest=False)
    paddle.save(layer.state_dict(), str(folder / "paddle.pdparams"))
    paddle.save({"state_dict": layer.state_dict(), "epoch": 3, "lr": [0.1, None]}, str(folder / "nested.pdparams"), protocol=2)
    optimizer = {"state": {0: {"momentum_buffer": state["0.weight"]}}, "param_groups": []}
    torch_file.write(folder / "zip.pth", {"state_dict": {"module.encoder_q.conv1.weight": state["0.weight"]}, "epoch": 3,
                                          "optimizer": optimizer})
    torch_file.write_safetensors(folder / "a.safetensors", state, {"epoch": "3"})
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    body = (b"\x80\x02}q\0X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
            b"X\x01\0\0\x000X\x03\0\0\0cpuK\x06NtQK\0K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRs.")
    (folder / "legacy.pth").write_bytes(b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)) + body
                                        + pickle.dumps(["0"], 2) + struct.pack("<q6f", 6, *range(6)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


CALLS = [("os", "system", "touch {}"), ("posix", "system", "touch {}"), ("subprocess", "Popen", "touch {}"),
         ("builtins", "exec", "open('{}','w')"), ("builtins", "eval", "open('{}','w')"),
         ("__builtin__", "eval", "open('{}','w')"), ("builtins", "open", "{}"), ("builtins", "getattr", "x"),
         ("builtins", "__import__", "antigravity"), ("importlib", "import_module", "this"), ("numpy", "load", "{}"),
         ("numpy", "fromfile", "{}"), ("numpy", "save", "{}"), ("numpy.testing._private.utils", "runstring", "{}"),
         ("numpy.f2py.crackfortran", "myeval", "open('{}','w')"), ("paddle", "load", "{}"), ("torch", "load", "{}"),
         ("pickle", "loads", "{}"), ("shutil", "rmtree", "{}"), ("pathlib", "Path", "{}"), ("operator", "attrgetter", "x"),
         ("runpy", "run_path", "{}"), ("pty", "spawn", "{}"), ("ppdensecl.engine.checkpoint", "remove_all", "{}"),
         ("builtins", "bytearray", "x"), ("copyreg", "_reconstructor", "x"), ("numpy.core.multiarray", "fromstring", "x"),
         ("numpy", "ndarray", "x"), ("numpy", "dtype", "O"), ("_codecs", "encode", "x")]


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def asking(rng, trace):
    """A pickle of {"a": a call}."""
    module, name, argument = rng.choice(CALLS)
    function = rng.choice((f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"))
    arguments = b"(" + text(argument.format(trace)) * rng.choice((1, 1, 2)) + b"t"
    call = rng.choice((function + arguments + b"R", function + arguments + b"\x81", function + arguments + b"}\x92",
                       f"({module[:0]}".encode() + text(argument.format(trace)) + f"i{module}\n{name}\n".encode(),
                       b"(" + function + text(argument.format(trace)) + b"o", function + b"}" + text("a") + b"K\1sb",
                       function + arguments + b"R" + arguments + b"b", b"(" + function + arguments + b"RtQ"))
    return b"\x80\x04}" + rng.choice((text("a") + call + b"s.", call + b"K\1s.", text("a") + b"]" + call + b"as."))


def tower(rng):
    """Few bytes that ask for much: shared tuples as keys, members and values; numbers, lengths and memo places without end."""
    depth = rng.choice((5, 40, 3000))
    tree = b"K\1" + rng.choice((b"2\x86", b"\x85")) * depth
    huge = struct.pack("<I", rng.choice((2**31 - 1, 2**27)))
    name = b"}" + text("a")
    return b"\x80\x04" + rng.choice((
        b"}" + tree + b"K\1s.", b"}(" + tree + b"K\1u.", name + b"\x8f(" + tree + b"\x90s.", b"(" + tree + b"\x91.",
        name + tree + b"s.", b"(" + tree + b"K\1d.", b"}r" + huge + b".", b"}\x8b" + huge + b".", b"}T" + huge + b".",
        b"\x95" + struct.pack("<Q", 2**40) + b"}.", b"}I" + b"9" * 4000 * depth + b"\nK\1s.",
        b"}" + (text("a") + b"}") * depth + b"s" * depth + b".", b"}\x94" + text("a") + b"h\0s.", name + b"]\x94h\0as.",
        b"}" + text("a\nb" * depth) + b"K\1s.", b"}(" + text("x" * 9999) + b"2" * depth + b"t" + b"0."))


def rezip(data, rng, change):
    """The same zip with a changed data.pkl, checksums correct."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", rng.choice((0, 0, 8))) as again:
        for name in archive.namelist():
            again.writestr(name, change(archive.read(name)) if name.endswith("data.pkl") else archive.read(name))
    return out.getvalue()
