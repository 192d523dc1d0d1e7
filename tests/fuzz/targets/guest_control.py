"""Messages between a host and its guest, and on the control socket: what each side reads of the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from remora.wire import control_v1, guest_v1, remora_v1
from remora.wire.protobuf import DecodeError, Message

_MESSAGES: list[type[Message]] = sorted(
    {kind for table in (guest_v1, control_v1, remora_v1) for pair in table.METHODS.values() for kind in pair},
    key=lambda kind: (kind.__module__, kind.__name__),
)


def case(data: bytes) -> None:
    if not data:
        return
    cls = _MESSAGES[data[0] % len(_MESSAGES)]
    try:
        read = cls.decode(data[1:])
    except DecodeError:
        return
    written = read.to_bytes()
    assert cls.decode(written).to_bytes() == written
    repr(read)


def _example(kind: str) -> Any:
    return {"string": "text", "bytes": b"bytes", "bool": True, "double": 1.5, "float": 0.5}.get(kind, 7)


def _filled(cls: type[Message], depth: int = 2) -> Message:
    """Return a message with something in every field."""
    values: dict[str, Any] = {}
    for field in cls._fields.values():
        if field.kind == "message" and not depth:
            continue
        one = _filled(field.message_class, depth - 1) if field.kind == "message" else _example(field.kind)
        values[field.name] = {"key" if field.map_key == "string" else 1: one} if field.map_key else one
        if field.repeated:
            values[field.name] = [one, one]
    return cls(**values)


def seeds() -> Iterator[bytes]:
    for index, cls in enumerate(_MESSAGES):
        yield bytes([index]) + _filled(cls).to_bytes()
