"""The codec: what it accepts, it must be able to write and to read again."""

from __future__ import annotations

from collections.abc import Iterator

from remora.wire.protobuf import (
    DecodeError,
    Limits,
    Message,
    bool_,
    bytes_,
    double,
    enum,
    fixed32,
    fixed64,
    float_,
    int32,
    int64,
    map_,
    message,
    sfixed32,
    sint64,
    string,
    uint32,
    uint64,
)

_LIMITS = Limits(max_depth=8, max_elements=512)


class Leaf(Message, keep_unknown=True):
    number: int = sint64(1)
    text: str = string(2)
    maybe: int | None = uint32(3, optional=True)


class Everything(Message):
    a: int = int32(1)
    b: int = int64(2)
    c: int = uint64(3)
    d: bool = bool_(4)
    e: int = enum(5)
    f: float = float_(6)
    g: float = double(7)
    h: int = fixed32(8)
    i: int = fixed64(9)
    text: str = string(10)
    view: bytes | memoryview = bytes_(11)
    own: bytes = bytes_(12)
    leaf: Leaf | None = message(13, Leaf)
    leaves: list[Leaf] = message(14, Leaf, repeated=True)
    numbers: list[int] = int64(15, repeated=True)
    fixed: list[int] = sfixed32(16, repeated=True)
    texts: list[str] = string(17, repeated=True)
    by_name: dict[str, Leaf] = map_(18, "string", Leaf)
    by_number: dict[int, str] = map_(19, "int32", "string")
    again: Everything | None = message(20, lambda: Everything)


def case(data: bytes) -> None:
    try:
        read = Everything.decode(data, limits=_LIMITS)
    except DecodeError:
        return
    written = read.to_bytes()
    assert b"".join(map(bytes, read.encode())) == written
    # Compared as bytes: NaN is not equal to itself.
    assert Everything.decode(written).to_bytes() == written
    repr(read)


def seeds() -> Iterator[bytes]:
    leaf = Leaf(number=-7, text="leaf", maybe=0)
    whole = Everything(
        a=-1,
        b=1 << 60,
        c=1 << 63,
        d=True,
        e=3,
        f=1.5,
        g=-0.0,
        h=7,
        i=9,
        text="text",
        view=b"view",
        own=b"own",
        leaf=leaf,
    )
    yield whole.to_bytes()
    yield Everything(leaves=[leaf, Leaf()], numbers=[1, -1, 1 << 40], fixed=[-1, 2], texts=["a", ""]).to_bytes()
    yield Everything(by_name={"x": leaf, "": Leaf()}, by_number={1: "one"}).to_bytes()
    yield Everything(again=Everything(again=Everything(again=whole))).to_bytes()
    yield b"\xf3\x01\x08\x01\xf4\x01"  # an unknown group
