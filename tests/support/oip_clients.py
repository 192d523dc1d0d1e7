"""One REST request or gRPC call of the Open Inference Protocol, by nothing but a socket and the codec."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpack import Decoder, Encoder

from remora.agent.web.http2_frames import PREFACE, header

SERVICE = "inference.GRPCInferenceService"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1


@dataclass(frozen=True)
class Reply:
    """`status` is HTTP's or gRPC's; `headers` hold the trailers as well."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    return sock


def rest(path: Path, verb: str, target: str, document: Any = None, **headers: str) -> Reply:
    """Make a request on a connection of its own."""
    body = b"" if document is None else document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"{verb} {target} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    with connected(path) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        got = b""
        while piece := sock.recv(65536):
            got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    named = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return Reply(int(first.split(" ")[1]), named, body)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the agent has closed the connection"
        data += piece
    return data


class Grpc:
    """One HTTP/2 connection, one call at a time."""

    def __init__(self, path: Path) -> None:
        self._sock = connected(path)
        self._sock.sendall(PREFACE + header(0, _SETTINGS, 0, 0))
        self._encoder, self._decoder = Encoder(), Decoder()
        self._stream = -1

    def call(self, method: str, message: bytes = b"", **headers: str) -> Reply:
        """Make a unary call; `body` of the reply is its message, without the prefix."""
        self._stream += 2
        named = {":method": "POST", ":scheme": "http", ":path": f"/{SERVICE}/{method}", ":authority": "x"}
        named |= {"content-type": "application/grpc", "te": "trailers"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        block = self._encoder.encode(list(named.items()))
        data = struct.pack(">BI", 0, len(message)) + message
        self._sock.sendall(header(len(block), _HEADERS, _END_HEADERS, self._stream) + block)
        self._sock.sendall(header(len(data), _DATA, _END_STREAM, self._stream) + data)
        return self._reply()

    def _reply(self) -> Reply:
        found: dict[str, str] = {}
        body = b""
        while True:
            high, low, kind, flags, stream = struct.unpack(">HBBBI", _exactly(self._sock, 9))
            payload = _exactly(self._sock, high << 8 | low)
            if kind == _SETTINGS and not flags & _ACK:
                self._sock.sendall(header(0, _SETTINGS, _ACK, 0))
            if stream != self._stream:
                continue
            if kind == _HEADERS:
                found |= {str(name): str(value) for name, value in self._decoder.decode(payload)}
            elif kind == _DATA:
                body += payload
            if flags & _END_STREAM and kind in (_HEADERS, _DATA):
                return Reply(int(found.get("grpc-status", "-1")), found, body[5:])

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Grpc:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
