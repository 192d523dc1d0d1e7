"""HTTP/2 frames taken apart before h2 sees them, so that a tensor's bytes go where they will stay.

h2 would buffer every frame whole and copy it four times (588 KiB: 4.4 ms of the agent's time; this way 0.6), also one
that is longer than it will accept. So the payload of DATA frames goes around h2, straight into a message's body, and
of all other frames only as much is gathered as such a frame may have. Format: RFC 9113, sections 4.1 and 6.1.
"""

from __future__ import annotations

import struct
from typing import Protocol

from remora.agent.web.exchange import Body
from remora.errors import ProtocolError

#: What every HTTP/2 client sends first (RFC 9113, section 3.4); no HTTP/1.1 request begins so.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER = struct.Struct(">HBBBI")
HEADER_BYTES = _HEADER.size
DATA = 0
_GOAWAY = struct.Struct(">II")
END_STREAM, _PADDED = 0x1, 0x8
_STREAM_MASK = (1 << 31) - 1
#: The largest frame: DATA frames cost a fixed time each, whatever they carry, and nothing is buffered of them.
MAX_FRAME_BYTES = (1 << 24) - 1
#: Largest frame of any other kind; header lists are limited to less.
MAX_CONTROL_BYTES = 32768
#: One read beyond message bodies. Small, because frames that carry nothing cost most for their size.
_SCRATCH_BYTES = 16384
#: From here on bytes are received into the body itself.
_DIRECT_BYTES = 4096


class Sink(Protocol):
    """Who takes what the frames carry."""

    def control(self, frame: bytes) -> None:
        """Take any whole frame that is not DATA, or the connection preface."""

    def data(self, stream: int, payload: memoryview) -> None:
        """Take part of a stream's data; valid until it returns."""

    def data_ended(self, stream: int, size: int, *, end_stream: bool) -> None:
        """A DATA frame of `size` bytes, padding included, is over."""

    def body_of(self, stream: int) -> Body | None:
        """Return the body that a stream's data goes into, if that is known yet."""


def header(size: int, kind: int, flags: int, stream: int) -> bytes:
    """Return a frame's header."""
    return _HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream)


def goaway(last_stream: int) -> bytes:
    """Return the frame that says: nothing after `last_stream` is looked at, and no error is why."""
    return header(_GOAWAY.size, 7, 0, 0) + _GOAWAY.pack(last_stream, 0)


class FrameReader:
    """Splits received bytes into frames. Call `get_buffer`, receive into it, then `received` with the count.

    Raises:
        ProtocolError: (`received`) a frame is larger than allowed, or its padding than the frame.
    """

    __slots__ = (
        "_data_left",
        "_direct",
        "_flags",
        "_left",
        "_pending",
        "_preface_left",
        "_scratch",
        "_sink",
        "_size",
        "_stream",
    )

    def __init__(self, sink: Sink, scratch: memoryview, preface_bytes: int) -> None:
        self._sink = sink
        self._scratch = scratch[:_SCRATCH_BYTES]
        self._preface_left = preface_bytes
        #: The start of a frame (or the preface) of which the rest has not come.
        self._pending = b""
        #: The DATA frame that is being received: its stream, flags and size.
        self._stream = self._flags = self._size = 0
        #: Bytes that are left of it; and of these, how many are no padding (-1: the padding's length comes first).
        self._left = self._data_left = 0
        self._direct: Body | None = None

    def get_buffer(self) -> memoryview:
        if self._data_left >= _DIRECT_BYTES:
            body = self._sink.body_of(self._stream)
            if body is not None and len(rest := body.rest()) >= _DIRECT_BYTES:
                self._direct = body
                return rest[: self._data_left]
        return self._scratch

    def received(self, count: int) -> None:
        body, self._direct = self._direct, None
        if body is not None:
            body.filled += count
            self._data_left -= count
            self._left -= count
            if not self._left:
                self._ended()
            return
        data = memoryview(self._pending + self._scratch[:count]) if self._pending else self._scratch[:count]
        self._pending = b""
        position = 0
        while position < len(data):
            taken = self._payload(data[position:]) if self._left else self._frame(data[position:])
            if not taken:
                self._pending = bytes(data[position:])
                return
            position += taken

    def _frame(self, data: memoryview) -> int:
        """Take the next frame, or the header of a DATA frame; return how many bytes that was, 0 if more must come."""
        if self._preface_left:
            return self._control(data, self._preface_left)
        if len(data) < HEADER_BYTES:
            return 0
        high, low, kind, flags, stream = _HEADER.unpack_from(data)
        size = high << 8 | low
        if kind != DATA:
            if size > MAX_CONTROL_BYTES:
                raise ProtocolError(f"a frame of type {kind} has {size} bytes, {MAX_CONTROL_BYTES} are allowed")
            return self._control(data, HEADER_BYTES + size)
        self._stream, self._flags, self._size = stream & _STREAM_MASK, flags, size
        self._left = size
        self._data_left = -1 if flags & _PADDED else size
        if not size:
            if flags & _PADDED:
                raise ProtocolError("a DATA frame has padding but no length of it")
            self._ended()
        return HEADER_BYTES

    def _control(self, data: memoryview, size: int) -> int:
        if len(data) < size:
            return 0
        self._preface_left = 0
        self._sink.control(bytes(data[:size]))
        return size

    def _payload(self, data: memoryview) -> int:
        """Take bytes of the DATA frame that is being received; return how many."""
        if self._data_left < 0:
            self._data_left = self._left - 1 - data[0]
            if self._data_left < 0:
                raise ProtocolError("a DATA frame has more padding than bytes")
            taken = 1
        elif self._data_left:
            taken = min(self._data_left, len(data))
            self._data_left -= taken
            self._sink.data(self._stream, data[:taken])
        else:
            taken = min(self._left, len(data))
        self._left -= taken
        if not self._left:
            self._ended()
        return taken

    def _ended(self) -> None:
        self._sink.data_ended(self._stream, self._size, end_stream=bool(self._flags & END_STREAM))
