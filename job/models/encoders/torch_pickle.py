"""Reads a weight file of PyTorch's first format without PyTorch, as data.

Such a file is a sequence of pickles, and a pickle can call any function. Here only four names are
known, and none of them is a function of a library that does more than hold values:
`collections.OrderedDict`, the tensor rebuild, and the storages of float32 and int64. Only the
operations that such files need are allowed. The values are checked after everything is read.
"""

import io
import math
import pickle
import pickletools
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from flexunet.errors import ContentError

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_OPERATIONS = frozenset(
    (
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
        *("BINUNICODE", "LONG1", "BININT", "BININT1", "BININT2", "NONE", "NEWTRUE", "NEWFALSE"),
        *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("SETITEM", "SETITEMS", "APPEND", "APPENDS"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    )
)
_STORAGES = {("torch", "FloatStorage"): "<f4", ("torch", "LongStorage"): "<i8"}
_MAX_SIDES = 8
# What `pickle` raises for bytes that are no pickle, and the checks for values of other types.
_ERRORS = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, MemoryError, OverflowError),
    *(ValueError, TypeError, AttributeError, LookupError),
)


class _Storage(NamedTuple):
    kind: str  # NumPy's name of the type
    key: str
    number: int  # of values


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Replaces `torch._utils._rebuild_tensor_v2`; has no attribute that a pickle could set."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any
    ) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        kind = _STORAGES.get((module, name))
        if kind is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return kind

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, device, number, view = pid
        if (word, device, view) != ("storage", "cpu", None) or kind not in _STORAGES.values():
            raise pickle.UnpicklingError(f"{str(pid)[:80]} is no storage")
        if type(key) is not str or type(number) is not int or number < 0:
            raise pickle.UnpicklingError(f"{str(pid)[:80]} is no storage")
        return _Storage(kind, key, number)


def read_torch_arrays(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a weight file of PyTorch by name, float32 or int64.

    Args:
        data: the whole file.
        where: origin of `data`, for error messages.

    Raises:
        ContentError: `data` is no such file, is damaged, or asks for anything else.
    """
    try:
        return _arrays(io.BytesIO(data))
    except _ERRORS as error:
        problem = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ContentError(f"{where}: not a weight file of PyTorch ({problem})") from error


def _arrays(file: io.BytesIO) -> dict[str, np.ndarray]:
    if (_next(file), _next(file)) != (_MAGIC, _VERSION):
        raise ValueError("it does not begin as one of its first format")
    if _next(file).get("little_endian") is not True:
        raise ValueError("it is not little-endian")
    tensors, keys = _next(file), _next(file)
    if type(tensors) is not OrderedDict or type(keys) is not list:
        raise TypeError("it does not hold named tensors")
    storages: dict[str, _Storage] = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise ValueError(f"storage {tensor.storage.key} is described in two ways")
    if sorted(keys) != sorted(storages):
        raise ValueError("it does not store what its tensors use")
    values = {key: _values(file, storages[key]) for key in keys}
    if file.read(1):
        raise ValueError("more bytes follow its last values")
    return {name: _array(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}


def _next(file: io.BytesIO) -> Any:
    """Returns the object of the next pickle in `file`."""
    start = file.tell()
    largest = 0
    for operation, argument, _ in pickletools.genops(file):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"the operation {operation.name} is not allowed")
        if operation.name == "LONG_BINPUT" and argument is not None:
            largest = max(largest, int(argument))
    end = file.tell()
    # Memory grows with the largest number of a remembered object.
    if largest > end - start:
        raise pickle.UnpicklingError(f"it remembers an object under the number {largest}")
    file.seek(start)
    return _Unpickler(io.BytesIO(file.read(end - start)), encoding="utf-8").load()


def _check(name: Any, tensor: Any) -> None:
    """Refuses a tensor of which an element is outside of its storage, or is there twice."""
    if type(name) is not str or type(tensor) is not _Tensor or type(tensor.storage) is not _Storage:
        raise TypeError("it does not hold named tensors")
    shape, strides = tensor.shape, tensor.strides
    for sides in (shape, strides):
        if type(sides) is not tuple or len(sides) > _MAX_SIDES or len(sides) != len(shape):
            raise ValueError(f"{name}: shape {str(shape)[:80]} and strides {str(strides)[:80]}")
    if any(type(each) is not int or each < 0 for each in (tensor.offset, *shape, *strides)):
        raise ValueError(f"{name}: shape {str(shape)[:80]} and strides {str(strides)[:80]}")
    last = tensor.offset + sum(
        (side - 1) * stride for side, stride in zip(shape, strides, strict=True)
    )
    number = math.prod(shape)
    if number > tensor.storage.number or (number and last >= tensor.storage.number):
        raise ValueError(
            f"{name}: shape {shape} and strides {strides} exceed its storage of "
            f"{tensor.storage.number} values"
        )


def _values(file: io.BytesIO, storage: _Storage) -> np.ndarray:
    (number,) = struct.unpack("<q", file.read(8))
    if number != storage.number:
        raise ValueError(f"storage {storage.key} has {number} values, not {storage.number}")
    size = number * np.dtype(storage.kind).itemsize
    data = file.read(size)
    if len(data) != size:
        raise EOFError(f"storage {storage.key} is cut off")
    return np.frombuffer(data, storage.kind)


def _array(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    size = values.dtype.itemsize
    strides = [stride * size for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
    return np.array(view, order="C")
