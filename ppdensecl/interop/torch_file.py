"""PyTorch checkpoint files without PyTorch, and without ever running what a file asks for.

Formats: zip (PyTorch ≥ 1.6: `<root>/data.pkl` and one stored record `<root>/data/<key>` for each storage), legacy
(magic number, protocol, system information, pickle, storage keys, storages) and safetensors.
Source: torch/serialization.py of PyTorch (`_save`, `_legacy_save`).
"""

import io
import struct
import zipfile

import numpy as np

from ppdensecl.errors import UserError
from ppdensecl.files import replacing
from ppdensecl.interop.safetensors_file import (  # noqa: F401 (the two safetensors functions belong to this interface)
    opened, read_bytes, read_safetensors, show, write_safetensors)
from ppdensecl.interop.torch_pickle import Storage, Unpickler, pickled

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_RATIO = 16  # torch stores its records uncompressed; somebody may have packed them again, but weights hardly shrink


def read(path):
    """The dictionary in a PyTorch (.pth, .pt, zip or legacy) or safetensors checkpoint, tensors as numpy arrays.

    Tensors are C-contiguous and native-endian. float16/32/64, bool, (u)int8 to (u)int64 and complex64/128 keep their
    type; bfloat16 becomes float32, exactly. Contiguous tensors of one storage share its memory, as in PyTorch; the
    others are copies. Parameters are plain arrays, an OrderedDict is a dict (its attributes, such as `_metadata`, are
    dropped), torch.Size a tuple, a dtype or device a string such as "torch.float32" or "cuda:0".

    Raises UserError, and has run nothing, when the file is missing, empty, cut short, damaged or of another kind; asks
    for anything but tensors and plain containers (the sentence says for what); holds numbers that numpy lacks (float8,
    quantised, complex32); is TorchScript, the tar format of PyTorch before 0.1.10, or from a big-endian machine
    (legacy format only); would read outside its storages or unfold to many times its size.
    """
    with opened(path) as (file, size):
        head = file.read(512)
        file.seek(0)
        if not head:
            raise UserError(f"{path}: the file is empty; expected a PyTorch or safetensors checkpoint")
        if head[257:262] == b"ustar":
            raise UserError(f"{path}: is in the tar format of PyTorch before 0.1.10, which is not supported; "
                            "load it and save it again with a newer PyTorch")
        if str(path).endswith(".safetensors") or (head[8:9] == b"{" and head[:4] != b"PK\3\4"):
            return read_safetensors(path)
        value = (_read_zip if head[:4] == b"PK\3\4" else _read_legacy)(path, file, size)
        if type(value) is not dict:
            raise UserError(f"{path}: holds a {type(value).__name__}, not a dictionary; expected a checkpoint")
        _check_plain(path, value)
        return value


def read_pickle(path):
    """What a bare pickle holds, such as .pdparams files are, under the same rules. Raises UserError."""
    with opened(path) as (file, size):
        value = Unpickler(_Bounded(file, size), path, size).load()
        _check_plain(path, value)
        return value


def _check_plain(path, value, sizes=None, above=None):
    """The number of things in `value`. Refuses what would trip whoever walks through it or prints it: containers within
    themselves, nested without measure or the same ones again and again, and storages outside of tensors.
    """
    sizes, above = ({}, set()) if above is None else (sizes, above)
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        if isinstance(value, Storage):
            raise UserError(f"{path}: holds a storage outside of a tensor; refused")
        return 1
    if id(value) not in sizes:
        if id(value) in above or len(above) > 100:
            raise UserError(f"{path}: holds a container within itself or nested deeper than 100 levels; refused")
        above.add(id(value))
        items = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_check_plain(path, item, sizes, above) for item in items)
        above.remove(id(value))
        if sizes[id(value)] > 10**7:
            raise UserError(f"{path}: holds containers that unfold to more than ten million things; refused")
    return sizes[id(value)]


def _read_zip(path, file, size):
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name[:-8] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{path}: is a zip archive without <name>/data.pkl, so not a PyTorch checkpoint")
        if roots[0] + "constants.pkl" in members:
            raise UserError(f"{path}: is a TorchScript archive; save the model's state_dict() instead")
        budget = size

        def record(name, needed=0):
            nonlocal budget
            info = members[roots[0] + name]
            if info.file_size < needed:
                raise UserError(f"{path}: record {show(name)} has {info.file_size} bytes and its tensor needs "
                                f"{needed}; the file is cut short or damaged")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path}: record {show(name)} is compressed in a way that PyTorch never uses; refused")
            # Honest records are stored side by side, so that together they are no larger than the file.
            budget -= info.file_size if info.compress_type == zipfile.ZIP_STORED else info.file_size // _RATIO
            if budget < 0:
                raise UserError(f"{path}: its records unpack to far more than the size of the file; refused")
            if info.CRC == 0:
                del info.CRC  # PyTorch can be told to leave checksums out and writes 0; zipfile then checks none
            with archive.open(info) as stream:
                return read_bytes(stream, info.file_size)

        order = {b"little": "<", b"big": ">"}[
            record("byteorder").tobytes() if roots[0] + "byteorder" in members else b"little"]
        storages = {}

        def storage(key, count, itemsize):
            if key not in storages:
                if count == 0 and f"{roots[0]}data/{key}" not in members:
                    return np.empty(0, np.uint8)
                storages[key] = record("data/" + key, count * itemsize)
            return storages[key]

        return Unpickler(io.BytesIO(record("data.pkl").tobytes()), path, size, storage, order).load()


def _read_legacy(path, file, size):
    bounded = _Bounded(file, size)
    magic = Unpickler(bounded, path, size).load()
    if type(magic) is not int or magic != _MAGIC:
        raise UserError(f"{path}: is a pickle, but not one that torch.save made")
    protocol, system = Unpickler(bounded, path, size).load(), Unpickler(bounded, path, size).load()
    if type(protocol) is not int or protocol != _PROTOCOL or system.get("little_endian") is not True:
        raise UserError(f"{path}: legacy checkpoint of protocol {show(protocol)} or from a big-endian machine; "
                        f"expected protocol {_PROTOCOL} and little-endian numbers")
    # The storages follow the pickle that describes them: read it once for their sizes, again for the tensors.
    start, sizes, storages = file.tell(), {}, {}

    def describe(key, count, itemsize):
        sizes.setdefault(key, (count, itemsize))

    Unpickler(bounded, path, size, describe).load()
    for key in Unpickler(bounded, path, size).load():
        if type(key) is not str or key not in sizes:
            raise UserError(f"{path}: holds a storage {show(key)} that belongs to no tensor; the file is damaged")
        count, itemsize = sizes[key]
        if struct.unpack("<q", bounded.read(8))[0] != count:
            raise UserError(f"{path}: gives two sizes for storage {show(key)}; the file is damaged")
        if count * itemsize > size - file.tell():
            raise UserError(f"{path}: storage {show(key)} claims {count * itemsize} bytes, but the file has "
                            f"{size - file.tell()} left; it is cut short or damaged")
        storages[key] = read_bytes(file, count * itemsize)
    file.seek(start)
    return Unpickler(bounded, path, size, lambda key, *_: storages[key]).load()


class _Bounded:
    """What an unpickler needs of a file, without trusting the lengths it asks for."""

    def __init__(self, file, size):
        self._file, self._size = file, size

    def read(self, count):
        if count > self._size - self._file.tell():
            raise EOFError("the file ends within its pickled part")
        return self._file.read(count)

    def readline(self):
        return self._file.readline(1 << 20)


def write(path, state_dict):
    """Write name -> ndarray as a PyTorch checkpoint (zip format) that `torch.load(path, weights_only=True)` reads.

    Values may also be dicts, lists, tuples, strings, numbers, booleans and None, nested. dtypes: bool, uint8, int8 to
    int64, float16/32/64, complex64/128; each array gets a storage of its own. Equal content gives equal bytes. The file
    appears under `path` only when complete.
    Raises UserError: a dtype or value that the format lacks; a folder that cannot be written.
    """
    arrays = []
    body = b"\x80\x02" + pickled(path, state_dict, arrays) + b"."
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, file, "data.pkl", body)
        _record(archive, file, "byteorder", b"little")
        for key, array in enumerate(arrays):
            _record(archive, file, f"data/{key}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        _record(archive, file, "version", b"3\n")


def _record(archive, file, name, data):
    """PyTorch maps records into memory: their bytes begin at multiples of 64, after a padding in the extra field."""
    info = zipfile.ZipInfo("archive/" + name)
    header = 30 + len(info.filename) + 4 + (20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0)
    padding = -(file.tell() + header) % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)


