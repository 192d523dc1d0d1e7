"""A ttrpc server without I/O: frames in pieces of any size, requests, streams; every block comes back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from remora.errors import InvalidArgumentError, ProtocolError, RemoraError, UnavailableError
from remora.wire.ttrpc.calls import Call, Calls
from remora.wire.ttrpc.core import data_frame, request_frame
from remora.wire.ttrpc.frames import NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, FrameDecoder

_MOST_BYTES = 1 << 20
_scratch = memoryview(bytearray(8192))


class Blocks:
    """Memory for large bodies, counted."""

    def __init__(self) -> None:
        self.out = 0

    def allocate(self, size: int) -> Any:
        assert size <= _MOST_BYTES
        self.out += 1
        owner = self

        class Block:
            view = memoryview(bytearray(size))

            def release(self) -> None:
                owner.out -= 1

        return Block()


class Wire:
    """Takes what calls send, and must not hear of faults."""

    def __init__(self) -> None:
        self.sent = 0

    def transmit(self, pieces: Any, on_sent: Callable[[], None] | None = None) -> None:
        self.sent += sum(map(len, pieces))
        if on_sent is not None:
            on_sent()

    def call_ended(self, _call: Call) -> None:
        pass

    def refused(self, error: RemoraError) -> None:
        pass

    def report(self, error: BaseException) -> None:
        raise error


def handle(call: Call) -> None:
    """Answer, refuse, or wait for more, by the method's first letter."""
    _ = call.metadata

    def echo(body: Any, release: Callable[[], None]) -> None:
        call.send([body])
        release()

    def end() -> None:
        call.finish()

    if call.method[:1] == "s":
        call.on_message = echo
        call.on_half_close = end
    elif call.method[:1] == "e":
        raise InvalidArgumentError("no")
    elif call.method[:1] != "w":
        call.respond([call.payload])


def feed(decoder: FrameDecoder, data: bytes, take: Callable[[Any], None]) -> None:
    """Hand bytes over as a socket would, in pieces that the first byte chooses."""
    step = (1, 7, 10, 11, 64, 8192)[data[0] % 6] if data else 1
    at = 1
    while at < len(data):
        room = decoder.get_buffer()
        piece = data[at : at + min(step, len(room))]
        room[: len(piece)] = piece
        at += len(piece)
        for frame in decoder.received(len(piece)):
            take(frame)


def case(data: bytes) -> None:
    blocks, wire = Blocks(), Wire()
    decoder = FrameDecoder(_MOST_BYTES, scratch=_scratch, allocate=blocks.allocate)
    calls = Calls(wire)

    def take(frame: Any) -> None:
        call = calls.received(frame)
        if call is not None:
            call.run(handle, call)

    try:
        feed(decoder, data, take)
    except ProtocolError:
        pass
    decoder.close()
    calls.expire()
    calls.cancel_all(UnavailableError("gone"))
    assert not calls.active
    assert not blocks.out
    assert wire.sent <= 64 * len(data) + 4096


def _joined(*frames: Any) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in frame)


def seeds() -> Iterator[bytes]:
    plain = request_frame(1, "a.Service", "Echo", [b"payload"])
    timed = request_frame(3, "a.Service", "Echo", [b"more"], timeout_s=1.5, metadata={"k": ["v", "w"]})
    yield b"\0" + _joined(plain, timed)
    yield b"\5" + _joined(plain, request_frame(3, "a.Service", "error", None), timed)
    stream = request_frame(1, "a.Service", "stream", None, flags=REMOTE_OPEN | NO_DATA)
    yield b"\1" + _joined(stream, data_frame(1, [b"one"]), data_frame(1, None, REMOTE_CLOSED | NO_DATA))
    yield b"\2" + _joined(request_frame(1, "a.Service", "wait", None)) + struct.pack(">IIBB", 70000, 3, 1, 0)
    yield b"\5" + struct.pack(">IIBB", 1 << 24, 1, 1, 0) + bytes(50)
