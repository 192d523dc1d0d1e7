"""How each protobuf field is written and read: closures that `protobuf.Message` strings together, class by class.

Closures instead of generated source: compiling source text costs a guest under emulation more than it ever sends, and a
call per field costs about 0.1 us. They are built when a class is first encoded or decoded, so that declaring messages
costs next to nothing.

Encoders append pieces to one flat list and decoders write into the message's `__dict__`; bytes beyond `BIG_BYTES` are
never copied, in either direction. This module must not know messages beyond their `_codec()`.
"""

from __future__ import annotations

import struct

from remora.wire.protobuf_kinds import (
    END_GROUP,
    FIXED,
    FIXED32,
    FIXED64,
    LENGTH,
    MASK32,
    START_GROUP,
    VARINT,
    VARINTS,
    DecodeError,
    as_bytes_view,
    read_length,
    read_varint,
    to_wire_of,
    varint,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from remora.wire.protobuf_kinds import Piece

    Encoder = Callable[[List[Piece], Any], None]
    Decoder = Callable[[Dict[str, Any], Piece, int, int, "Context"], int]

#: Bytes fields from this size on stay buffers of their own when encoded; smaller ones are cheaper to copy (0.1 us).
BIG_BYTES = 4096


class Context:
    """What is left of a decode call's limits."""

    __slots__ = ("depth", "elements")

    def __init__(self, depth: int, elements: int) -> None:
        self.depth = depth
        self.elements = elements

    def take(self, count: int) -> None:
        self.elements -= count
        if self.elements < 0:
            raise DecodeError("message holds more repeated elements than the decoder's max_elements allows")

    def enter(self) -> None:
        self.depth -= 1
        if self.depth < 0:
            raise DecodeError("message is nested deeper than the decoder's max_depth allows")


# -- encoders: append the field to `out`; the caller has decided that it is present -----------------------------------


def scalar_encoder(kind: str, key: bytes) -> Encoder:
    to_wire = to_wire_of(kind)

    def encode(out: List[Piece], value: Any) -> None:
        out.append(key + to_wire(value))

    def encode_bytes(out: List[Piece], value: Any) -> None:
        view = as_bytes_view(value)
        size = len(view)
        if size < BIG_BYTES:
            out.append(key + varint(size) + view)
        else:
            out.append(key + varint(size))
            out.append(view)

    return encode_bytes if kind == "bytes" else encode


def packed_encoder(kind: str, key: bytes) -> Encoder:
    to_wire = to_wire_of(kind)
    code = FIXED[kind][0] if kind in FIXED else ""

    def encode(out: List[Piece], values: Any) -> None:
        body = struct.pack(f"<{len(values)}{code}", *values) if code else b"".join(map(to_wire, values))
        out.append(key + varint(len(body)) + body)

    return encode


def repeated_encoder(one: Encoder) -> Encoder:
    def encode(out: List[Piece], values: Any) -> None:
        if isinstance(values, (str, bytes)):
            raise TypeError(f"a list of values wanted, not one {type(values).__name__}")
        for value in values:
            one(out, value)

    return encode


def message_encoder(cls: Any, key: bytes) -> Encoder:
    def encode(out: List[Piece], value: Any) -> None:
        if not isinstance(value, cls):
            raise TypeError(f"{cls.__name__} wanted, not {type(value).__name__}")
        index = len(out)
        out.append(b"")  # its length is known only once its fields are there
        value.encode_to(out)
        out[index] = key + varint(sum(map(len, out[index + 1 :])))

    return encode


def map_encoder(key: bytes, encode_key: Encoder, encode_value: Encoder) -> Encoder:
    def encode(out: List[Piece], values: Any) -> None:
        for name, value in values.items():
            index = len(out)
            out.append(b"")
            encode_key(out, name)
            encode_value(out, value)
            out[index] = key + varint(sum(map(len, out[index + 1 :])))

    return encode


# -- decoders: read the value at `pos` into `values`, return the position after it ------------------------------------


def varint_decoder(kind: str, name: str) -> Decoder:
    convert = VARINTS[kind][1]
    small = tuple(map(convert, range(128)))

    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        value = buf[pos]
        if value < 128:
            values[name] = small[value]
            return pos + 1
        value, pos = read_varint(buf, pos)
        values[name] = convert(value)
        return pos

    return decode


def fixed_decoder(kind: str, name: str) -> Decoder:
    layout = struct.Struct("<" + FIXED[kind][0])
    unpack, size = layout.unpack_from, layout.size

    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        (values[name],) = unpack(buf, pos)
        return pos + size

    return decode


def _take_string(buf: Piece, start: int, stop: int) -> str:
    return str(buf[start:stop], "utf-8")


def _take_bytes(buf: Piece, start: int, stop: int) -> bytes:
    return bytes(buf[start:stop])


def _take_view(buf: Piece, start: int, stop: int) -> memoryview:
    return memoryview(buf)[start:stop]


def _taker(kind: str, view: bool) -> Callable[[Piece, int, int], Any]:
    return _take_string if kind == "string" else _take_view if view else _take_bytes


def length_decoder(kind: str, name: str, view: bool) -> Decoder:
    take = _taker(kind, view)

    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        start, stop = read_length(buf, pos, end)
        values[name] = take(buf, start, stop)
        return stop

    return decode


def repeated_decoder(one: Decoder, name: str) -> Decoder:
    """Return a decoder that appends what `one`, a decoder of the singular field, reads."""

    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        context.take(1)
        cell: Dict[str, Any] = {}
        pos = one(cell, buf, pos, end, context)
        values.setdefault(name, []).append(cell[name])
        return pos

    return decode


def packed_decoder(kind: str, name: str) -> Decoder:
    def decode_fixed(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        start, stop = read_length(buf, pos, end)
        count, rest = divmod(stop - start, size)
        if rest:
            raise DecodeError(f"packed field {name}: {stop - start} bytes are no whole number of elements")
        context.take(count)
        values.setdefault(name, []).extend(struct.unpack_from(f"<{count}{code}", buf, start))
        return stop

    def decode_varints(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        pos, stop = read_length(buf, pos, end)
        items = values.setdefault(name, [])
        room = len(items) + context.elements
        while pos < stop:
            value = buf[pos]
            pos += 1
            if value > 127:
                value, pos = read_varint(buf, pos - 1)
            items.append(convert(value))
            if len(items) > room:
                break
        context.take(len(items) - room + context.elements)
        if pos != stop:
            raise DecodeError(f"packed field {name}: its last element is cut off")
        return stop

    if kind in FIXED:
        code = FIXED[kind][0]
        size = struct.calcsize("<" + code)
        return decode_fixed
    convert = VARINTS[kind][1]
    return decode_varints


def message_decoder(cls: Any, name: str) -> Decoder:
    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        start, stop = read_length(buf, pos, end)
        context.enter()
        message = values.get(name)
        if message is None:
            message = values[name] = cls()
        read_fields(message, buf, start, stop, context)
        context.depth += 1
        return stop

    return decode


def map_decoder(name: str, decode_key: Decoder, decode_value: Decoder, tags: Tuple[int, int], default: Any) -> Decoder:
    """Return a decoder of map entries; `default(kind)` makes what stands for an absent value."""
    table = {tags[0]: decode_key, tags[1]: decode_value}

    def decode(values: Dict[str, Any], buf: Piece, pos: int, end: int, context: Context) -> int:
        start, stop = read_length(buf, pos, end)
        context.take(1)
        context.enter()
        entry: Dict[str, Any] = {}
        read_table(table, entry, buf, start, stop, context)
        context.depth += 1
        key, value = default(entry)
        values.setdefault(name, {})[key] = value
        return stop

    return decode


def read_fields(message: Any, buf: Piece, pos: int, end: int, context: Context) -> None:
    """Decode `buf[pos:end]` into `message`, merging with what it holds."""
    table, unknown = message._codec()[1:]
    kept = read_table(table, message.__dict__, buf, pos, end, context, unknown)
    if kept:
        message.__dict__["_unknown"] = message.__dict__.get("_unknown", b"") + b"".join(kept)


def read_table(
    table: Dict[int, Decoder],
    values: Dict[str, Any],
    buf: Piece,
    pos: int,
    end: int,
    context: Context,
    keep: bool = False,
) -> Optional[List[bytes]]:
    """Decode fields by `table` (tag -> decoder) into `values`; return the unknown ones if `keep`."""
    kept: Optional[List[bytes]] = [] if keep else None
    while pos < end:
        start = pos
        tag = buf[pos]
        pos += 1
        if tag > 127:
            tag, pos = read_varint(buf, start)
        decoder = table.get(tag)
        if decoder is not None:
            pos = decoder(values, buf, pos, end, context)
            continue
        pos = _skip(tag, buf, pos, end, context)
        if kept is not None and pos <= end:
            kept.append(bytes(buf[start:pos]))
    if pos != end:
        raise DecodeError("the message ends in the middle of a field")
    return kept


def _skip(tag: int, buf: Piece, pos: int, end: int, context: Context) -> int:
    """Return the position after the value of an unknown field."""
    kind = tag & 7
    if tag < 8 or tag > MASK32:
        raise DecodeError(f"field number {tag >> 3} is not within 1..{MASK32 >> 3}")
    if kind == VARINT:
        return read_varint(buf, pos)[1]
    if kind == LENGTH:
        return read_length(buf, pos, end)[1]
    if kind == FIXED64:
        return pos + 8
    if kind == FIXED32:
        return pos + 4
    if kind != START_GROUP:
        raise DecodeError(f"field {tag >> 3} has wire type {kind}, which does not exist or ends no group")
    context.enter()
    while pos < end:
        inner, pos = read_varint(buf, pos)
        if inner == tag - START_GROUP + END_GROUP:
            context.depth += 1
            return pos
        pos = _skip(inner, buf, pos, end, context)
    raise DecodeError(f"the group of field {tag >> 3} does not end")
