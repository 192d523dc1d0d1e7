"""The scalar kinds of protobuf: what a value of each looks like on the wire, and the varints they are made of.

Apart from `protobuf_codec`, which puts tags and lengths around them, so that each of the two is read in one go.

Source of the format: https://protobuf.dev/programming-guides/encoding/. Where that leaves room (overlong varints,
values wider than their kind), Google's implementation decides; the tests compare with it.
"""

from __future__ import annotations

import struct

from remora.errors import InvalidArgumentError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Tuple, Union

    Piece = Union[bytes, memoryview]
    ToWire = Callable[[Any], bytes]

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = 0, 1, 2, 3, 4, 5
MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
#: Varints of 0..127, which is nearly all that occur.
_SMALL = tuple(bytes((n,)) for n in range(128))


class DecodeError(ProtocolError):
    """The bytes are no message of this type, or exceed a limit."""


class EncodeError(InvalidArgumentError):
    """A field holds a value that its kind cannot carry."""


# -- varints ----------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Return the varint of `value`, 0 <= value < 2**64."""
    if value < 128:
        return _SMALL[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(buf: Piece, pos: int) -> Tuple[int, int]:
    """Return (value, position after it). Bits beyond 64 are dropped, as Google's parser does."""
    byte = buf[pos]
    if byte < 128:
        return byte, pos + 1
    value, shift = byte & 127, 7
    while True:
        pos += 1
        byte = buf[pos]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & _MASK64, pos + 1
        shift += 7
        if shift == 70:
            raise DecodeError("a varint is longer than ten bytes")


def read_length(buf: Piece, pos: int, end: int) -> Tuple[int, int]:
    """Return (start, stop) of the length-delimited value at `pos`."""
    size = buf[pos]
    pos += 1
    if size > 127:
        size, pos = read_varint(buf, pos - 1)
    stop = pos + size
    if stop > end:
        raise DecodeError(f"a field of {size} bytes does not fit into the {max(0, end - pos)} bytes that are left")
    return pos, stop


def _signed32(value: int) -> int:
    value &= MASK32
    return value - (1 << 32) if value >> 31 else value


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _zigzag32(value: int) -> int:
    value &= MASK32
    return (value >> 1) ^ -(value & 1)


def _zigzag64(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _ranged(low: int, high: int, map_value: Optional[Callable[[int], int]] = None) -> ToWire:
    def to_wire(value: Any) -> bytes:
        if 0 <= value < 128 and map_value is None:
            small: bytes = _SMALL[value]
            return small
        number = value.__index__()
        if not low <= number <= high:
            raise ValueError(f"{number} is not within {low}..{high}")
        if map_value is not None:
            number = map_value(number)
        return varint(number & _MASK64)

    return to_wire


def _bool_to_wire(value: Any) -> bytes:
    return b"\1" if value else b"\0"


def _string_to_wire(value: Any) -> bytes:
    raw: bytes = value.encode()
    return varint(len(raw)) + raw


def as_bytes_view(value: Any) -> Piece:
    """Return the bytes of any contiguous buffer, without a copy."""
    if type(value) is bytes:
        return value
    view = memoryview(value)
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else view.cast("B")


def _bytes_to_wire(value: Any) -> bytes:
    return b"".join((varint(memoryview(value).nbytes), as_bytes_view(value)))


_S32, _S64 = (-(1 << 31), (1 << 31) - 1), (-(1 << 63), (1 << 63) - 1)

#: Varint kinds: encoder, and the value of what was read.
VARINTS: Dict[str, Tuple[ToWire, Callable[[int], Any]]] = {
    "int32": (_ranged(*_S32), _signed32),
    "int64": (_ranged(*_S64), _signed64),
    "uint32": (_ranged(0, MASK32), lambda value: value & MASK32),
    "uint64": (_ranged(0, _MASK64), int),
    "sint32": (_ranged(*_S32, lambda value: (value << 1) ^ (value >> 31)), _zigzag32),
    "sint64": (_ranged(*_S64, lambda value: (value << 1) ^ (value >> 63)), _zigzag64),
    "bool": (_bool_to_wire, bool),
    "enum": (_ranged(*_S32), _signed32),
}
#: Fixed-size kinds: struct format, wire type.
FIXED: Dict[str, Tuple[str, int]] = {
    "double": ("d", FIXED64),
    "fixed64": ("Q", FIXED64),
    "sfixed64": ("q", FIXED64),
    "float": ("f", FIXED32),
    "fixed32": ("I", FIXED32),
    "sfixed32": ("i", FIXED32),
}
DEFAULTS: Dict[str, Any] = {
    **dict.fromkeys(VARINTS, 0),
    **dict.fromkeys(FIXED, 0),
    "bool": False,
    "double": 0.0,
    "float": 0.0,
    "string": "",
    "bytes": b"",
    "message": None,
}


def wire_type(kind: str) -> int:
    return VARINT if kind in VARINTS else FIXED[kind][1] if kind in FIXED else LENGTH


def to_wire_of(kind: str) -> ToWire:
    if kind in VARINTS:
        return VARINTS[kind][0]
    if kind in FIXED:
        return struct.Struct("<" + FIXED[kind][0]).pack
    return _string_to_wire if kind == "string" else _bytes_to_wire
