"""safetensors files with numpy alone, and what every checkpoint reader and writer here shares.

The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape,
data_offsets; `__metadata__` -> strings), then the tensors' bytes without gaps or overlaps.
Source: https://huggingface.co/docs/safetensors/index#format
"""

import contextlib
import json
import math
import os
import pickle
import reprlib
import struct
import zipfile
import zlib

import numpy as np

from ppdensecl.errors import UserError
from ppdensecl.files import replacing

# What parsers raise on bytes that are not what they should be (ValueError includes UnicodeError and
# JSONDecodeError, RuntimeError includes RecursionError and NotImplementedError, LookupError KeyError).
_BROKEN = (ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError,
           RuntimeError, TypeError, ValueError, pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error)
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
           "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "u1", "C64": "c8"}
_NAMES = {"b1": "BOOL", **{code: name for name, code in _DTYPES.items() if name not in ("BF16", "BOOL")}}
_HEADER_LIMIT = 100_000_000  # the format's own limit


def show(value, length=80):
    """`value` from a file as one short printable line for an error message."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # repr of a hostile nested tuple may never end
    text = "".join(c if c.isprintable() else "?" for c in text[:length + 1])
    return text if len(text) <= length else text[:length] + "…"


@contextlib.contextmanager
def opened(path):
    """Context: (binary file, size in bytes). What unreadable or damaged content raises inside becomes a UserError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file; give the path of a checkpoint")
    try:
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except _BROKEN as error:
        raise UserError(f"{path}: not a PyTorch, Paddle or safetensors checkpoint, or cut short or damaged "
                        f"({type(error).__name__}: {show(str(error))})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or show(str(error))})") from error


def read_bytes(file, count):
    """`count` bytes as uint8 array. The caller has compared `count` with the size of the file."""
    data = np.empty(count, np.uint8)
    done = 0
    while done < count:
        got = file.readinto(data[done:].data)
        if not got:
            raise EOFError(f"{count - done} bytes are missing at the end")
        done += got
    return data


def widen(view, kind):
    """C-contiguous native copy of `view`. kind "bfloat16": uint16 bits to float32, exactly; "bool": bytes to bool."""
    if kind == "bfloat16":
        bits = view.astype(np.uint32, order="C")
        bits <<= 16
        return bits.view(np.float32)
    if kind == "bool":  # any other byte than 0 and 1 would be an invalid numpy bool
        return np.not_equal(view, 0, out=np.empty(view.shape, bool))
    return view.astype(view.dtype.newbyteorder("="), order="C")


def read_safetensors(path):
    """Tensors of a safetensors file: dict of name -> C-contiguous ndarray.

    BF16 is widened exactly to float32; float8 and smaller types are refused by name, as numpy lacks them.
    Raises UserError: header longer than the file, not JSON, tensors that overlap, leave gaps or end past the file.
    """
    with opened(path) as (file, size):
        return _tensors(path, file, size)


def read_safetensors_metadata(path):
    """The strings under `__metadata__`: dict of str -> str, empty when the file has none. Raises UserError."""
    with opened(path) as (file, size):
        return _header(path, file, size).get("__metadata__", {})


def _header(path, file, size):
    start = file.read(8)
    length = struct.unpack("<Q", start)[0]
    if length > min(size - 8, _HEADER_LIMIT):
        raise UserError(f"{path}: announces a header of {length} bytes, but the whole file has {size}; "
                        "not a safetensors file, or damaged")
    header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    notes = header.get("__metadata__", {})
    if not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("__metadata__ holds more than strings")
    return header


def _unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return result


def _tensors(path, file, size):
    header = _header(path, file, size)
    base, total = file.tell(), size - file.tell()
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in _DTYPES:
            raise UserError(f"{path}: stores '{show(name)}' as {show(kind)}, a number type that numpy lacks")
        dtype = np.dtype("<" + _DTYPES[kind])
        if not all(type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape)) or len(shape) > 32 or end > total:
            raise UserError(f"{path}: tensor '{show(name)}' of shape {show(shape)} cannot lie at bytes "
                            f"{show((begin, end))} of {total}; the file is cut short or damaged")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: tensor '{show(name)}' of shape {show(shape)} and type {kind} does not fill its "
                            f"{end - begin} bytes; the file is damaged")
        found.append((begin, end, name, kind, shape, dtype))
    position, result = 0, dict.fromkeys(name for name in header if name != "__metadata__")
    for begin, end, name, kind, shape, dtype in sorted(found, key=lambda item: item[:2]):
        if begin != position:
            raise UserError(f"{path}: the bytes of tensor '{show(name)}' "
                            f"{'overlap another tensor' if begin < position else 'follow a gap'}; the file is damaged")
        file.seek(base + begin)
        stored = read_bytes(file, end - begin).view(dtype).reshape(shape)
        special = {"BF16": "bfloat16", "BOOL": "bool"}.get(kind)
        result[name] = stored if special is None and dtype.isnative else widen(stored, special)
        position = end
    if position != total:
        raise UserError(f"{path}: has {total - position} bytes after its last tensor; the file is damaged")
    return result


def write_safetensors(path, state_dict, metadata=None):
    """Write name -> ndarray as a safetensors file; `metadata` is a dict of str -> str.

    dtypes: bool, (u)int8 to (u)int64, float16/32/64, complex64. The file appears under `path` only when complete.
    Raises UserError: a dtype, name or metadata that the format lacks; a folder that cannot be written.
    """
    metadata = metadata or {}
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise UserError(f"{path}: the metadata of a safetensors file must map strings to strings")
    arrays = {}
    for name, value in state_dict.items():
        array = np.asarray(value)
        if not isinstance(name, str) or name == "__metadata__" or array.dtype.str[1:] not in _NAMES:
            raise UserError(f"{path}: '{show(name)}' of dtype {array.dtype} cannot be stored in a safetensors file")
        arrays[name] = array
    offsets, position = {}, 0
    # Widest types first keeps every tensor aligned to its item size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in order:
        offsets[name] = [position, position + arrays[name].nbytes]
        position += arrays[name].nbytes
    header = {"__metadata__": metadata} if metadata else {}
    for name, array in arrays.items():
        header[name] = {"dtype": _NAMES[array.dtype.str[1:]], "shape": list(array.shape), "data_offsets": offsets[name]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = arrays[name]
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
