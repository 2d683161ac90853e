"""The pickles that PyTorch and Paddle make: read without running anything that they ask for, PyTorch's written as well.

A pickle is a program: it names functions and calls them. The interpreter here knows a short list of names, each of
which stands for a function of this file. Nothing is imported or looked up by name, so that a pickle can make tensors,
numbers, strings and plain containers, and nothing else.
Source: torch/_utils.py (`_rebuild_tensor_v2`) and torch/serialization.py (`persistent_id`) of PyTorch.
"""

import _compat_pickle
import math
import pickle
import struct

import numpy as np

from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import show, widen

_SCALARS = (str, bytes, int, float, complex, bool, type(None))
# Numbers in a file: torch's name of the storage and of the dtype, numpy's code. bfloat16 and bool need `widen`.
_NUMBERS = [("Double", "float64", "f8"), ("Float", "float32", "f4"), ("Half", "float16", "f2"),
            ("BFloat16", "bfloat16", "bfloat16"), ("Long", "int64", "i8"), ("Int", "int32", "i4"),
            ("Short", "int16", "i2"), ("Char", "int8", "i1"), ("Byte", "uint8", "u1"), ("Bool", "bool", "bool"),
            ("ComplexFloat", "complex64", "c8"), ("ComplexDouble", "complex128", "c16")]
_STORAGES = {f"torch.{storage}Storage": code for storage, _, code in _NUMBERS}
_STORAGE_OF = {np.dtype(code).str[1:]: storage for storage, _, code in _NUMBERS if code != "bfloat16"}
_DTYPES = {f"torch.{dtype}": code for _, dtype, code in _NUMBERS}
_DTYPES.update({"torch.uint16": "u2", "torch.uint32": "u4", "torch.uint64": "u8"})  # without a storage of their own
_STORAGES.update({"torch.storage.UntypedStorage": "u1", "torch.storage._UntypedStorage": "u1"})
_NO_NUMPY = {"torch." + name for name in (
    "ComplexHalfStorage QInt8Storage QUInt8Storage QInt32Storage QUInt4x2Storage QUInt2x4Storage complex32 qint8 "
    "quint8 qint32 quint4x2 quint2x4 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 _utils._rebuild_qtensor").split()}
_NUMPY_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
_RAW = {"bfloat16": "u2", "bool": "u1"}  # how their bytes are read …
_FINAL = {"bfloat16": "f4"}  # … and what comes out
_HEADROOM = 1 << 26  # bytes of copies that any file may ask for, however small it is
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL INST "
    "OBJ PERSID BINPERSID GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE").split()


class _Global(str):
    """A known name from the file, such as "torch.FloatStorage". Only the table `_CALLS` gives it a meaning."""


class Storage:
    """`data`: the storage's bytes as uint8 array, None while a legacy file is read for its sizes."""

    def __init__(self, code, data):
        self.code, self.data = code, data


class Unpickler(pickle._Unpickler):
    """A pickle interpreter whose every call ends in a function of this file.

    It builds on Python's own interpreter written in Python, because the one in C can neither be told which instructions
    to accept nor kept from allocating what a file claims. `size` of the whole file bounds what copies may take, since
    a few bytes of pickle can ask for the same copy again and again. `storage(key, count, itemsize)` gives a storage's
    bytes (uint8), `order` is their byte order.
    """

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}

    def __init__(self, file, path, size, storage=None, order="<"):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._path, self._fetch, self._order, self._spare = path, storage, order, 4 * size + _HEADROOM
        self._unset = {}  # id -> numpy array that _reconstruct made and BUILD has not filled

    def _refuse(self, what):
        return UserError(f"{self._path}: {what}; refused, nothing was run")

    def _charge(self, nbytes):
        self._spare -= nbytes
        if self._spare < 0:
            raise self._refuse("unfolds to many times the size of the file")

    def find_class(self, module, name):
        # Under Python 2's names, such as __builtin__ and commands, as Python 3 writes them up to protocol 2.
        modern = _compat_pickle.IMPORT_MAPPING.get(module, module)
        asked = ".".join(_compat_pickle.NAME_MAPPING.get((module, name), (modern, name)))
        known = asked.replace("numpy._core.", "numpy.core.", 1)
        if known in _NO_NUMPY:
            raise self._refuse(f"holds {known}, but numpy lacks such numbers")
        if known not in _CALLS and known not in _TYPES:
            raise self._refuse(f"asks for {show(asked)}, which is neither a tensor nor a plain container")
        return _Global(known)

    def _call(self, function, arguments):
        if type(function) is not _Global or function not in _CALLS or type(arguments) is not tuple:
            raise self._refuse(f"calls {show(function)}, which is neither a tensor nor a plain container")
        return _CALLS[function](self, *arguments)

    # Instructions that call, fill or hash something; the others only move plain values about.

    def _reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _instantiate(self, function, arguments):  # called by INST and OBJ
        self.append(self._call(function, tuple(arguments)))

    def _top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise self._refuse(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _append(self):
        value = self.stack.pop()
        self._top(list).append(value)

    def _appends(self):
        items = self.pop_mark()
        self._top(list).extend(items)

    def _additems(self):
        items = self.pop_mark()
        self._top(set).update(map(self._key, items))

    def _frozenset(self):
        items = self.pop_mark()  # replaces self.append
        self.append(frozenset(map(self._key, items)))

    def _setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[self._key(key)] = value

    def _popped_pairs(self):
        items = self.pop_mark()
        if len(items) % 2:
            raise self._refuse("has a key without a value")
        return self._pairs(zip(items[::2], items[1::2]))

    def _setitems(self):
        pairs = self._popped_pairs()
        self._top(dict).update(pairs)

    def _dict(self):
        pairs = self._popped_pairs()
        self.append(dict(pairs))

    def _build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:  # attributes of an OrderedDict: dropped
            return
        if isinstance(target, np.dtype):
            if show(state[1]) not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
                raise self._refuse(f"holds a numpy dtype with the state {show(state)}")
        elif id(target) in self._unset:
            del self._unset[id(target)]
            _, shape, dtype, fortran, data = state
            self._check_integers(shape)
            data = self._bytes(data)
            if not isinstance(dtype, np.dtype) or math.prod(shape) * dtype.itemsize != len(data):
                raise self._refuse(f"fills a numpy array of shape {show(shape)} with {len(data)} bytes")
            np.ndarray.__setstate__(target, (1, shape, dtype, bool(fortran), data))
        else:
            raise self._refuse(f"sets attributes of a {type(target).__name__}")

    dispatch.update({ord(code): method for code, method in (
        (pickle.REDUCE, _reduce), (pickle.NEWOBJ, _reduce), (pickle.BUILD, _build), (pickle.APPEND, _append),
        (pickle.APPENDS, _appends), (pickle.ADDITEMS, _additems), (pickle.FROZENSET, _frozenset),
        (pickle.SETITEM, _setitem), (pickle.SETITEMS, _setitems), (pickle.DICT, _dict))})

    def persistent_load(self, pid):
        """A storage: ("storage", type, key, device, count); legacy files add None or (key, start, count) of a part."""
        well_formed = type(pid) is tuple and len(pid) in (5, 6) and show(pid[0]) == "storage"
        _, kind, key, _, count, part = (*pid, None)[:6] if well_formed else [None] * 6
        if type(kind) is not _Global or kind not in _STORAGES or type(key) is not str or self._fetch is None:
            raise self._refuse(f"refers to {show(pid)}, which is not the storage of a tensor")
        code = _STORAGES[kind]
        itemsize = np.dtype(_RAW.get(code, code)).itemsize
        self._check_integers((count,))
        data = self._fetch(key, count, itemsize)
        if data is None:
            return Storage(code, None)
        _, start, count = part or (key, 0, count)
        self._check_integers((start, count))
        if (start + count) * itemsize > data.nbytes:
            raise self._refuse(f"storage {show(key)} claims {(start + count) * itemsize} bytes and has {data.nbytes}")
        return Storage(code, data[start * itemsize:(start + count) * itemsize])

    # What the known names stand for.

    def _check_integers(self, values):
        if type(values) not in (tuple, list) or len(values) > 32 or any(
                type(n) is not int or not 0 <= n < 2**63 for n in values):
            raise self._refuse(f"describes a tensor by {show(values)}; expected at most 32 whole numbers from 0")

    def _key(self, key):
        """Keys are scalars or tuples of them: hashing a tuple of twice the same tuple, 60 levels deep, never ends."""
        if not isinstance(key, _SCALARS) and not (type(key) is tuple and all(isinstance(k, _SCALARS) for k in key)):
            raise self._refuse(f"has a {type(key).__name__} as a key or member of a set")
        return key

    def _pairs(self, pairs):
        return [(self._key(key), value) for key, value in pairs]

    def _items(self, values):
        if type(values) not in (list, tuple, set, frozenset, dict):
            raise self._refuse(f"makes a container of a {type(values).__name__}")
        self._charge(64 * len(values))
        return values

    def _mapping(self, pairs=()):
        items = self._items(pairs)
        return dict(items if type(items) is dict else self._pairs(map(self._items, items)))

    def _bytes(self, value):
        if not isinstance(value, (bytes, str)):  # text: bytes as Python 2 pickled them
            raise self._refuse(f"has a {type(value).__name__} in the place of bytes")
        self._charge(len(value))
        return value if isinstance(value, bytes) else value.encode("latin1")

    def _encode(self, text, codec="latin1"):
        if show(codec) not in ("latin1", "latin-1"):
            raise self._refuse(f"encodes text as {show(codec)}")
        return self._bytes(text)

    def _device(self, kind, index=None):
        return show(kind) if index is None else f"{show(kind)}:{show(index)}"

    def _size(self, values):
        self._check_integers(values)
        return tuple(values)

    def _numpy_dtype(self, code, align=False, copy=True):
        if type(code) is not str or code not in _NUMPY_CODES:
            raise self._refuse(f"asks for a numpy array or scalar of dtype {show(code)}, which is not a plain number")
        return np.dtype("<" + code)

    def _numpy_scalar(self, dtype, data):
        data = self._bytes(data)
        if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
            raise self._refuse(f"makes a numpy scalar of {len(data)} bytes and the dtype {show(dtype)}")
        return np.frombuffer(data, dtype)[0]

    def _ndarray(self, shape, code, data):
        """`numpy.ndarray(shape, dtype, buffer)`, as this project writes arrays."""
        self._check_integers(shape)
        dtype, data = self._numpy_dtype(show(code).lstrip("<|")), self._bytes(data)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise self._refuse(f"fills a numpy array of shape {show(shape)} with {len(data)} bytes")
        return np.ndarray(tuple(shape), dtype, data)

    def _numpy_array(self, kind, shape, code):
        array = np.empty(0, np.int8)
        self._unset[id(array)] = array
        return array

    def _tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None, code=None):
        """`torch._utils._rebuild_tensor` and _v2; `code` stands for another dtype than the storage's."""
        if type(storage) is not Storage:
            raise self._refuse(f"makes a tensor of {show(storage)}")
        for numbers in ((offset,), size, stride):
            self._check_integers(numbers)
        code, metadata = code or storage.code, metadata or {}
        final, raw = np.dtype(_FINAL.get(code, code)), np.dtype(_RAW.get(code, code)).newbyteorder(self._order)
        count, length = math.prod(size), len(size)
        if len(stride) != length:
            raise self._refuse(f"describes a tensor of size {show(size)} with strides {show(stride)}")
        if storage.data is None or count == 0:
            return np.empty(size if count == 0 else 0, final)
        end = offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1
        if end * raw.itemsize > storage.data.nbytes:
            raise self._refuse(f"has a tensor of size {show(size)} and strides {show(stride)} that needs "
                               f"{end * raw.itemsize} bytes of a storage of {storage.data.nbytes}")
        steps = [s * raw.itemsize if n > 1 else 0 for n, s in zip(size, stride)]
        view = np.ndarray(tuple(size), raw, storage.data, offset * raw.itemsize, steps)
        if view.flags.c_contiguous and raw == final and not metadata:
            return view
        self._charge(count * final.itemsize)
        tensor = widen(view, code)
        if metadata.get("conj"):
            np.conjugate(tensor, out=tensor)
        if metadata.get("neg"):
            np.negative(tensor, out=tensor)
        return tensor

    def _tensor_v3(self, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
        if type(dtype) is not _Global or dtype not in _DTYPES:
            raise self._refuse(f"makes a tensor of dtype {show(dtype)}")
        return self._tensor(storage, offset, size, stride, metadata=metadata, code=_DTYPES[dtype])

    def _parameter(self, data, *_):
        if not isinstance(data, np.ndarray):
            raise self._refuse(f"makes a parameter of {show(data)}")
        return data

    def _set(self, values=()):
        return set(map(self._key, self._items(values)))


_CALLS = {
    "torch._utils._rebuild_tensor": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v2": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v3": Unpickler._tensor_v3,
    "torch._utils._rebuild_parameter": Unpickler._parameter,
    "torch._utils._rebuild_parameter_with_state": Unpickler._parameter,
    "torch.Size": Unpickler._size,
    "torch.device": Unpickler._device,
    "collections.OrderedDict": Unpickler._mapping,
    "collections.Counter": Unpickler._mapping,
    "collections.defaultdict": lambda self, factory=None, pairs=(): self._mapping(pairs),
    "builtins.dict": Unpickler._mapping,
    "builtins.list": lambda self, values=(): list(self._items(values)),
    "builtins.tuple": lambda self, values=(): tuple(self._items(values)),
    "builtins.set": Unpickler._set,
    "builtins.frozenset": lambda self, values=(): frozenset(self._set(values)),
    "builtins.complex": lambda self, real, imaginary: complex(float(real), float(imaginary)),
    "builtins.bytes": lambda self: b"",  # how Python 3 pickles an empty one
    "_codecs.encode": Unpickler._encode,
    "numpy.dtype": Unpickler._numpy_dtype,
    "numpy.ndarray": Unpickler._ndarray,
    "numpy.core.multiarray.scalar": Unpickler._numpy_scalar,
    "numpy.core.multiarray._reconstruct": Unpickler._numpy_array,
}
_TYPES = {*_STORAGES, *_DTYPES, "torch.storage.TypedStorage"}


def pickled(path, value, arrays):
    """Pickle instructions that make `value`; arrays are appended to `arrays` and referred to by their position."""
    def sequence(values, start=b"(", end=b"t"):
        return start + b"".join(pickled(path, item, arrays) for item in values) + end

    if value is None or isinstance(value, bool):
        return {None: b"N", False: b"\x89", True: b"\x88"}[value]
    if isinstance(value, int):
        data = pickle.encode_long(value)
        return b"J" + struct.pack("<i", value) if -2**31 <= value < 2**31 else b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float) and not isinstance(value, np.generic):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, dict):
        return sequence([part for pair in value.items() for part in pair], b"}(", b"u")
    if isinstance(value, (list, tuple)):
        return sequence(value, *((b"](", b"e") if isinstance(value, list) else ()))
    array = np.asarray(value)
    name = _STORAGE_OF.get(array.dtype.str[1:])
    if not isinstance(value, (np.ndarray, np.generic)) or name is None:
        kind = f"an array of dtype {array.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise UserError(f"{path}: {kind} cannot be stored in a PyTorch checkpoint")
    strides = tuple(math.prod(array.shape[axis + 1:]) for axis in range(array.ndim))
    pid = [pickled(path, part, arrays) for part in ("storage", str(len(arrays)), "cpu", array.size)]
    pid.insert(1, f"ctorch\n{name}Storage\n".encode())
    arrays.append(array)
    layout = [pickled(path, part, arrays) for part in (0, array.shape, strides, False)]
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + b"".join(pid) + b"tQ" + b"".join(layout)
            + b"ccollections\nOrderedDict\n)RtR")
