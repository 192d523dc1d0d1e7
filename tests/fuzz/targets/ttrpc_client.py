"""What a server sends to a client (a guest's agent, or a host's guest): responses, streams, error statuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from remora.errors import NotFoundError, ProtocolError, RemoraError, UnavailableError
from remora.wire.protobuf import DecodeError
from remora.wire.ttrpc.core import Streams, data_frame, error_frame, response_frame
from remora.wire.ttrpc.frames import NO_DATA, REMOTE_CLOSED, FrameDecoder
from targets.ttrpc_frames import Blocks, feed

_scratch = memoryview(bytearray(8192))


def case(data: bytes) -> None:
    blocks = Blocks()
    decoder = FrameDecoder(1 << 20, scratch=_scratch, allocate=blocks.allocate)
    streams = Streams(max_unread_bytes=1 << 20)
    opened = [streams.open(server_streaming=bool(index % 2)) for index in range(4)]
    try:
        feed(decoder, data, streams.received)
    except ProtocolError:
        pass
    streams.fail(UnavailableError("gone"))
    decoder.close()
    for stream in opened:
        try:
            while stream.take() is not None:
                pass
        except (RemoraError, DecodeError) as error:
            str(error)


def _joined(*frames: Any) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in frame)


def seeds() -> Iterator[bytes]:
    error = NotFoundError("there is no such thing", fix="look elsewhere")
    yield b"\0" + _joined(response_frame(1, [b"payload"]), error_frame(5, error))
    yield b"\4" + _joined(
        data_frame(3, [b"one"]), data_frame(3, [b"two"]), data_frame(3, None, REMOTE_CLOSED | NO_DATA)
    )
    yield b"\5" + _joined(response_frame(7, []), response_frame(1, []))
