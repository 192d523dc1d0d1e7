"""Asks the node's systemd for what an installation needs of it: restart containerd, know the agent's units.

It is called over its own socket, `/run/systemd/private`, in D-Bus's wire format (dbus.freedesktop.org/doc, "Message
Protocol"): from a container no more than that socket need be mounted, neither the node's root nor its processes. A node
without systemd, or one whose systemd this process cannot reach, is told to its operator, who then does it.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from remora.errors import UnavailableError

_SOCKET = "run/systemd/private"
_CALL, _ANSWER, _ERROR = 1, 2, 3
_PATH, _INTERFACE, _MEMBER, _SIGNATURE = 1, 2, 3, 8
_TIMEOUT_S = 90.0
_MOST_BYTES = 1 << 20

Value = str | bool | list[str]


def reachable(root: Path) -> bool:
    """True if the systemd of the node whose root this is can be asked."""
    return (root / _SOCKET).is_socket()


def call(root: Path, method: str, *arguments: Value) -> None:
    """Call a method of systemd's manager (org.freedesktop.systemd1(5)).

    Raises:
        UnavailableError: systemd refused or does not answer; the message has its words.
    """
    fix = "journalctl -xe on the node has the reason; the files are in place, and the command can be given again"
    try:
        with socket.socket(socket.AF_UNIX) as bus:
            bus.settimeout(_TIMEOUT_S)
            bus.connect(str(root / _SOCKET))
            _authenticate(bus)
            bus.sendall(encode(method, *arguments))
            error = _answer(bus)
    except (OSError, struct.error) as failure:
        raise UnavailableError(f"systemd does not answer {method}: {failure}", fix=fix) from failure
    if error:
        raise UnavailableError(f"systemd refused {method} {arguments}: {error}", fix=fix)


def encode(method: str, *arguments: Value, path: str = "/org/freedesktop/systemd1", interface: str = "") -> bytes:
    """Return a method call with serial number 1, little-endian; lists are of strings."""
    body, signature = b"", ""
    for value in arguments:
        if isinstance(value, bool):
            body, signature = _pad(body, 4) + struct.pack("<I", value), signature + "b"
        elif isinstance(value, str):
            body, signature = _pad(body, 4) + _string(value), signature + "s"
        else:
            items = b""
            for one in value:
                items = _pad(items, 4) + _string(one)
            body, signature = _pad(body, 4) + struct.pack("<I", len(items)) + items, signature + "as"
    fields = _field(b"", _PATH, "o", _string(path))
    fields = _field(fields, _INTERFACE, "s", _string(interface or "org.freedesktop.systemd1.Manager"))
    fields = _field(fields, _MEMBER, "s", _string(method))
    if signature:
        fields = _field(fields, _SIGNATURE, "g", _signature(signature))
    head = struct.pack("<cBBBIII", b"l", _CALL, 0, 1, len(body), 1, len(fields))
    return _pad(head + fields, 8) + body


def _authenticate(bus: socket.socket) -> None:
    bus.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
    said = b""
    while not said.endswith(b"\r\n"):
        part = bus.recv(1)  # nothing of what follows
        if not part or len(said) > 1000:
            raise ConnectionError("it hung up")
        said += part
    if not said.startswith(b"OK "):
        raise PermissionError(f"it does not accept this user: {said.decode(errors='replace').strip()}")
    bus.sendall(b"BEGIN\r\n")


def _answer(bus: socket.socket) -> str:
    """Return what the answer to serial number 1 complains of; empty if it went well. Signals are passed over."""
    while True:
        head = _exactly(bus, 16)
        order = "<" if head[:1] == b"l" else ">"
        kind = head[1]
        body_bytes, _serial, field_bytes = struct.unpack(f"{order}III", head[4:])
        if body_bytes + field_bytes > _MOST_BYTES:
            raise ConnectionError("its message is too long")
        _exactly(bus, field_bytes + -field_bytes % 8)
        body = _exactly(bus, body_bytes)
        if kind == _ANSWER:
            return ""
        if kind == _ERROR:
            length = struct.unpack(f"{order}I", body[:4])[0] if len(body) >= 4 else 0
            return body[4 : 4 + length].decode(errors="replace") or "no reason given"


def _exactly(bus: socket.socket, count: int) -> bytes:
    whole = b""
    while len(whole) < count:
        part = bus.recv(count - len(whole))
        if not part:
            raise ConnectionError("it hung up")
        whole += part
    return whole


def _field(before: bytes, code: int, kind: str, value: bytes) -> bytes:
    """Append a header field, a structure of code and variant: aligned to 8, its string to 4."""
    start = _pad(before, 8) + bytes((code,)) + _signature(kind)
    return (start if kind == "g" else _pad(start, 4)) + value


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def _signature(value: str) -> bytes:
    return bytes((len(value),)) + value.encode() + b"\0"


def _pad(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)
