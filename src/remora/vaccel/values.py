"""Python values and the bytes of C that vAccel's arguments are, in both directions, without a loop per element.

What is a buffer stays one: numpy arrays, array.array, bytearray and memoryview are sent from where they lie, and what
the agent writes goes into them. Numbers become C numbers, text a C string, lists of numbers C arrays.
"""

from __future__ import annotations

import struct
import sys
from array import array

from remora.wire.vaccel_enums import ArgType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Optional, Sequence, Tuple

    #: From received bytes to a value of the kind that was given.
    Restore = Callable[[memoryview], Any]

#: struct and array code of each argument type, of scalars and of arrays of them.
_CODES = {
    ArgType.INT8: "b",
    ArgType.INT16: "h",
    ArgType.INT32: "i",
    ArgType.INT64: "q",
    ArgType.UINT8: "B",
    ArgType.UINT16: "H",
    ArgType.UINT32: "I",
    ArgType.UINT64: "Q",
    ArgType.FLOAT32: "f",
    ArgType.FLOAT64: "d",
    ArgType.BOOL: "?",
    ArgType.CHAR: "b",
    ArgType.UCHAR: "B",
}
_INT32 = range(-(1 << 31), 1 << 31)


def is_numpy(value: object) -> bool:
    """True for numpy's arrays and scalars; never imports numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def code_of(kind: int) -> str:
    """Return the element code of an argument type, empty for text, buffers and whatever has none."""
    return _CODES.get(kind) or _CODES.get(kind - 1, "")


def flat(value: Any) -> memoryview:
    """Return a contiguous buffer as bytes, without a copy.

    Raises:
        TypeError: it is no buffer.
        BufferError: it is not contiguous.
    """
    view = memoryview(value)
    if not view.c_contiguous:
        raise BufferError("the array is not contiguous; copy it first")
    return view.cast("B") if view.nbytes else memoryview(b"")


def to_c(value: Any, kind: int) -> Tuple[memoryview, Restore]:
    """Return the bytes of a value as an argument of that type, and the way back.

    Raises:
        TypeError: nothing of C corresponds to it.
        struct.error, OverflowError: the number does not fit the type.
    """
    code = code_of(kind)
    if isinstance(value, str):
        return memoryview(value.encode() + b"\0"), _text
    if isinstance(value, bool):
        return _number(value, code or "?")
    if isinstance(value, int):
        return _number(value, code or ("i" if value in _INT32 else "q"))
    if isinstance(value, float):
        return _number(value, code or "f")
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (str, bytes)):
            raise TypeError("lists of text are no vAccel argument")
        numbers = to_array(value, code or ("f" if any(isinstance(item, float) for item in value) else "i"))
        return flat(numbers), _as_list(numbers.typecode)
    if isinstance(value, bytes):
        return memoryview(value), bytes
    return flat(value), _nothing_back(value)


def to_array(values: Sequence[Any], code: str) -> array[Any]:
    return array("B" if code == "?" else code, values)


def _number(value: float, code: str) -> Tuple[memoryview, Restore]:
    form = "<" + code

    def restore(view: memoryview) -> Any:
        return struct.unpack_from(form, view)[0]

    return memoryview(struct.pack(form, value)), restore


def _text(view: memoryview) -> str:
    return bytes(view).partition(b"\0")[0].decode(errors="replace")


def _as_list(code: str) -> Restore:
    def restore(view: memoryview) -> List[Any]:
        numbers: array[Any] = array(code)
        numbers.frombytes(view)
        return numbers.tolist()

    return restore


def _nothing_back(value: Any) -> Restore:
    """What was written lies in the caller's own buffer; one that cannot be written to gets its bytes back instead."""
    view = memoryview(value)

    def restore(received: memoryview) -> Any:
        if view.readonly:
            return bytes(received)
        flat(value)[: len(received)] = received
        return value

    return restore


def like(example: Any, data: memoryview, code: str) -> Any:
    """Return received numbers as the caller gave theirs: numpy for numpy, a list for a list, else an array.array."""
    if is_numpy(example):
        numpy = sys.modules["numpy"]
        return numpy.frombuffer(bytearray(data), dtype=numpy.dtype("<" + {"i": "i4", "f": "f4", "d": "f8"}[code]))
    numbers: array[Any] = array(code)
    numbers.frombytes(data)
    return numbers.tolist() if isinstance(example, (list, tuple)) else numbers


def numbers(value: Any, code: str, length: Optional[int] = None) -> memoryview:
    """Return a list or buffer of numbers as the bytes of a C array; numpy arrays are converted if they must be."""
    if is_numpy(value):
        numpy = sys.modules["numpy"]
        value = numpy.ascontiguousarray(value, dtype="<" + {"i": "i4", "f": "f4", "d": "f8"}[code])
    elif isinstance(value, (list, tuple)) or (isinstance(value, array) and value.typecode != code):
        value = array(code, value)
    data = flat(value)
    if length is not None and len(data) < length * struct.calcsize(code):
        raise ValueError(f"{length} numbers were announced, the data has {len(data)} bytes")
    return data
