"""A vAccel client made of Google's protobuf and plain sockets: nothing of it is ours but the test."""

from __future__ import annotations

import socket
import struct
from typing import Any

from vaccel_schema import METHODS, Schema

_REQUEST, _RESPONSE, _DATA = 1, 2, 3
_CLOSED, _OPEN, _NO_DATA = 1, 2, 4


class RemoteError(Exception):
    """An error status: ttrpc code, message, and the `vaccel.Error` of its first detail (None without details)."""

    def __init__(self, code: int, message: str, error: Any, type_url: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.error = error
        self.type_url = type_url

    @property
    def errno(self) -> int | None:
        """What an application would see as errno; None without details."""
        if self.error is None:
            return None
        return int(self.error.ffi_error) if self.error.HasField("ffi_error") else 0


class GoogleClient:
    """One connection."""

    def __init__(self, sock: socket.socket, service: str) -> None:
        self._sock = sock
        self._service = service
        self._stream = -1
        self.schema = Schema()

    def message(self, name: str, /, **values: Any) -> Any:
        return self.schema.of(f"vaccel.{name}")(**values)

    def call(self, method: str, *, raw: bytes | None = None, timeout_s: float = 0, **values: Any) -> Any:
        """Make a unary call with the method's own messages; `raw` sends these bytes as the payload instead."""
        request_name, answer_name = METHODS.get(method, ("empty.Empty", "empty.Empty"))
        payload = self.message(request_name, **values).SerializeToString() if raw is None else raw
        self._send(self._request(method, payload, timeout_s), _REQUEST, 0)
        return self._answer(answer_name)

    def stream(self, messages: list[Any]) -> Any:
        """Make a GenopStream call."""
        self._send(self._request("GenopStream", b""), _REQUEST, _OPEN | _NO_DATA)
        for message in messages:
            self._transmit(message.SerializeToString(), _DATA, 0)
        self._transmit(b"", _DATA, _CLOSED | _NO_DATA)
        return self._answer("genop.Response")

    def arg(self, data: bytes, kind: int, **values: Any) -> Any:
        return self.message("genop.Arg", buf=data, size=values.pop("size", len(data)), arg_type=kind, **values)

    def close(self) -> None:
        self._sock.close()

    def _request(self, method: str, payload: bytes, timeout_s: float = 0) -> bytes:
        envelope = self.schema.of("ttrpc.Request")(
            service=self._service, method=method, payload=payload, timeout_nano=int(timeout_s * 1e9)
        )
        data: bytes = envelope.SerializeToString()
        return data

    def _send(self, body: bytes, kind: int, flags: int) -> None:
        self._stream += 2
        self._transmit(body, kind, flags)

    def _transmit(self, body: bytes, kind: int, flags: int) -> None:
        try:
            self._sock.sendall(struct.pack(">IIBB", len(body), self._stream, kind, flags) + body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer, if there was one, is still to be read

    def _answer(self, name: str) -> Any:
        size, stream, kind, _flags = struct.unpack(">IIBB", self._receive(10))
        body = self._receive(size)
        assert (stream, kind) == (self._stream, _RESPONSE)
        envelope = self.schema.of("ttrpc.Response").FromString(body)
        status = envelope.status
        if status.code:
            detail = status.details[0] if status.details else None
            error = None if detail is None else self.schema.of("vaccel.Error").FromString(detail.value)
            raise RemoteError(status.code, status.message, error, "" if detail is None else detail.type_url)
        assert envelope.HasField("status")  # present and empty, as vAccel's agent sends it
        return self.schema.of(f"vaccel.{name}").FromString(envelope.payload)

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            assert piece, "the agent closed the connection"
            data += piece
        return bytes(data)
