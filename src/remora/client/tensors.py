"""Arrays in and out of the SDK without an array library, and without a copy where there is one.

The rule for results: what you pass is what you get. A request with at least one numpy array is answered with numpy
arrays, any other with `Tensor`s. numpy is never imported because it happens to be installed (that costs a guest 600 ms
under emulation): it is looked for only among the modules that the program itself has imported, or imported when the
caller asks for arrays (`arrays=True`, `Tensor.numpy()`).
"""

from __future__ import annotations

import sys

from remora.errors import InvalidArgumentError
from remora.wire import remora_v1 as v1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

    #: Anything that exports the buffer protocol, contiguous: bytes, bytearray, memoryview, array.array, mmap, ...
    Buffer = Any  # PEP 688's type needs Python 3.12

#: struct codes by which an untyped buffer (array.array, memoryview) tells its element type, by size.
_DTYPE_OF_FORMAT: Dict[str, str] = {"?": "bool", "e": "float16", "f": "float32", "d": "float64"}
_SIGNED, _UNSIGNED = "bhilqn", "BHILQN"
#: numpy type name -> struct code.
FORMAT_OF_DTYPE: Dict[str, str] = {
    "bool": "?",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "float16": "e",
    "float32": "f",
    "float64": "d",
}


#: numpy types that need no conversion -> their names, which numpy spells out anew each time it is asked.
_known_dtypes: Dict[Any, str] = {}


class Tensor:
    """Row-major, little-endian numbers with a type and a shape.

    Args:
        data: Contiguous buffer; it is not copied, so it must not change while a request with it is under way.
        dtype: A numpy type name: `bool`, `uint8` ... `uint64`, `int8` ... `int64`, `float16`, `float32`, `float64`.
            None to take it from the buffer (an `array.array` or typed memoryview knows it; bytes are `uint8`).
        shape: Sizes of the dimensions, outermost first. None for one dimension, or the buffer's own.

    Raises:
        InvalidArgumentError: `dtype` is unknown, or `data` has not the bytes that `dtype` and `shape` need.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, data: Buffer, dtype: Optional[str] = None, shape: Optional[Sequence[int]] = None) -> None:
        view = _view(data)
        if dtype is None:
            dtype = _dtype_of(view)
        size_bytes = v1.DTYPES.get(dtype)
        if size_bytes is None:
            raise InvalidArgumentError(f"{dtype!r} is no element type", fix=f"use one of {', '.join(v1.DTYPES)}")
        if shape is None:
            shape = view.shape if view.itemsize == size_bytes and view.shape else (view.nbytes // size_bytes,)
        self.dtype: str = dtype
        self.shape: Tuple[int, ...] = tuple(shape)
        needed = size_bytes
        for size in self.shape:
            if not isinstance(size, int) or size < 0:
                raise InvalidArgumentError(f"shape {self.shape} holds {size!r}, which is no size")
            needed *= size
        if view.nbytes != needed:
            raise InvalidArgumentError(
                f"a {dtype} tensor of shape {self.shape} needs {needed} bytes, and the buffer has {view.nbytes}"
            )
        #: The bytes, as a flat memoryview of format "B".
        self.data: memoryview = view.cast("B") if view.nbytes else memoryview(b"")

    def numpy(self) -> Any:  # numpy.ndarray: not a type the guest side can name
        """Return a numpy array on the same memory (read-only if the memory is). Imports numpy."""
        import numpy

        return numpy.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def tolist(self) -> Any:  # nested lists of the shape's depth
        """Return the numbers as nested lists; a single number for a shape of ()."""
        import struct

        count = self.data.nbytes // v1.DTYPES[self.dtype]
        numbers: List[Any] = list(struct.unpack(f"<{count}{FORMAT_OF_DTYPE[self.dtype]}", self.data))
        for axis in range(len(self.shape) - 1, 0, -1):
            size = self.shape[axis]
            numbers = [numbers[i * size : (i + 1) * size] for i in range(_product(self.shape[:axis]))]
        return numbers if self.shape else numbers[0]

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        return (self.dtype, self.shape, self.data) == (other.dtype, other.shape, other.data)

    __hash__ = None  # type: ignore[assignment]  # equal by contents, which may change

    def __repr__(self) -> str:
        return f"Tensor(dtype={self.dtype!r}, shape={self.shape})"


def read(inputs: Mapping[str, Any]) -> Tuple[List[Tuple[str, Tensor]], bool]:
    """Return a request's tensors by name, and whether one of them came as a numpy array."""
    if not hasattr(inputs, "items"):
        raise InvalidArgumentError(
            f"inputs is a {type(inputs).__name__}", fix='pass a mapping of input name to array: {"input": array}'
        )
    tensors: List[Tuple[str, Tensor]] = []
    arrays = False
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensor = value
        elif _is_numpy(value):
            arrays = True
            tensor = _from_numpy(name, value)
        else:
            tensor = _from_buffer(name, value)
        tensors.append((name, tensor))
    return tensors, arrays


def to_wire(tensors: Iterable[Tuple[str, Tensor]]) -> List[v1.Tensor]:
    """Return tensors as a request carries them."""
    return [
        v1.Tensor(name=name, dtype=tensor.dtype, shape=list(tensor.shape), data=tensor.data) for name, tensor in tensors
    ]


def from_wire(tensors: Iterable[v1.Tensor], *, arrays: bool) -> Dict[str, Any]:
    """Return a response's tensors by name, on the memory of the receive buffer."""
    found: Dict[str, Any] = {}
    for message in tensors:
        found[message.name] = result(message.data, message.dtype, message.shape, arrays=arrays)
    return found


def result(data: Buffer, dtype: str, shape: Sequence[int], *, arrays: bool) -> Any:  # a Tensor or a numpy array
    """Return one tensor of a response."""
    tensor = Tensor(data, dtype, shape)
    return tensor.numpy() if arrays else tensor


def size_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor."""
    return v1.DTYPES[dtype] * _product(tuple(shape))


def _view(data: Buffer) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError as error:
        raise InvalidArgumentError(
            f"a {type(data).__name__} is no buffer", fix="pass bytes, a memoryview, an array.array or a numpy array"
        ) from error
    if not view.c_contiguous:
        raise InvalidArgumentError("the buffer is not contiguous", fix="copy it first: bytes(view)")
    return view


def _dtype_of(view: memoryview) -> str:
    code = view.format.lstrip("@=<")
    if code in _DTYPE_OF_FORMAT:
        return _DTYPE_OF_FORMAT[code]
    if len(code) == 1 and code in _SIGNED:
        return f"int{8 * view.itemsize}"
    if len(code) == 1 and (code in _UNSIGNED or code == "c"):
        return f"uint{8 * view.itemsize}"
    raise InvalidArgumentError(f"a buffer of format {view.format!r} has no element type of ours", fix="name the dtype")


def _is_numpy(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _from_numpy(name: str, value: Any) -> Tensor:  # numpy.ndarray or a numpy scalar
    import numpy

    array: Any = numpy.asarray(value)
    known = _known_dtypes.get(array.dtype)
    if known is not None and array.flags.c_contiguous and array.size:
        return Tensor(memoryview(array).cast("B"), known, array.shape)
    if array.dtype.name not in v1.DTYPES:
        raise InvalidArgumentError(
            f"input {name!r} has the numpy type {array.dtype.name}", fix=f"convert it to one of {', '.join(v1.DTYPES)}"
        )
    # Copies only what is not already contiguous and little-endian. ascontiguousarray alone would make () into (1,).
    shape = array.shape
    if array.dtype == array.dtype.newbyteorder("<"):
        _known_dtypes[array.dtype] = array.dtype.name
    array = numpy.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return Tensor(memoryview(array).cast("B") if array.size else b"", array.dtype.name, shape)


def _from_buffer(name: str, value: object) -> Tensor:
    if isinstance(value, (str, list, tuple, int, float)) or value is None:
        raise InvalidArgumentError(
            f"input {name!r} is a {type(value).__name__}, which has no element type and shape",
            fix="pass a numpy array, an array.array, or remora.Tensor(data, dtype, shape)",
        )
    return Tensor(value)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
