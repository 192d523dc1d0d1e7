"""Reads PyTorch weight files without PyTorch, and without running what is in them.

A `.pth` file is a pickle, and a pickle is a program. The unpickler here knows five names and gives every other one up,
so the program can only build a dict of arrays. Files come from pinned wheels anyway; this is the second lock.

The format is the legacy one (before PyTorch 1.6): pickles in a row for magic number, protocol, system information, the
dict and the list of storage keys, then for each key an int64 element count and the raw little-endian data. Shapes,
offsets and strides count in elements.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from typing import Any

import numpy as np

from remora.errors import InvalidArgumentError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
Array = np.ndarray[Any, np.dtype[Any]]


class _Storage:
    def __init__(self, dtype: str, count: int) -> None:
        self.dtype = np.dtype(dtype)
        self.count = count
        self.data: Array | None = None


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(part, int) and part >= 0 for part in numbers):
            raise InvalidArgumentError("the weight file has a tensor with an impossible shape")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
        if 0 not in shape and last >= storage.count:
            raise InvalidArgumentError("the weight file has a tensor that ends outside its storage")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> Array:
        data = self.storage.data
        if data is None:
            raise InvalidArgumentError("the weight file has a tensor without data")
        step = self.storage.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, tuple(stride * step for stride in self.strides), writeable=False
        )
        return np.array(view, order="C")


def _rebuild_tensor(
    storage: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise InvalidArgumentError("the weight file has a tensor without a storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:  # typeshed's signature
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise InvalidArgumentError(f"the weight file asks for {module}.{name}, which is not allowed")

    def persistent_load(self, pid: Any) -> _Storage:  # typeshed's signature
        kind, dtype, key, _location, count = pid[:5]
        if kind != "storage" or not isinstance(count, int) or count < 0:
            raise InvalidArgumentError("the weight file has an unknown kind of storage")
        return self.storages.setdefault(str(key), _Storage(dtype, count))


def read_weights(data: bytes) -> dict[str, Array]:
    """Return the named arrays of a legacy `.pth` file.

    Raises:
        InvalidArgumentError: it is no such file, is damaged, or holds anything but arrays.
    """
    stream = io.BytesIO(data)
    try:
        if _Unpickler(stream).load() != _MAGIC or _Unpickler(stream).load() != _PROTOCOL:
            raise InvalidArgumentError("this is not a legacy PyTorch weight file")
        _Unpickler(stream).load()  # system information: sizes of C types, always little-endian in practice
        unpickler = _Unpickler(stream)
        tensors = unpickler.load()
        keys = _Unpickler(stream).load()
        for key in keys:
            _read_storage(stream, unpickler.storages[str(key)])
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, struct.error) as error:
        raise InvalidArgumentError(f"the weight file is damaged: {error}") from error
    return {str(name): tensor.array() for name, tensor in tensors.items() if isinstance(tensor, _Tensor)}


def _read_storage(stream: io.BytesIO, storage: _Storage) -> None:
    (count,) = struct.unpack("<q", stream.read(8))
    if count != storage.count:
        raise InvalidArgumentError("the weight file has a storage of another size than it says")
    storage.data = np.frombuffer(stream.read(count * storage.dtype.itemsize), dtype=storage.dtype, count=count)
