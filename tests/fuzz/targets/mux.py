"""The channel mux at the host, whose peer is a guest that may send anything at all."""

from __future__ import annotations

from collections.abc import Iterator

from remora.errors import ProtocolError
from remora.wire import mux_frames as frames
from remora.wire.mux import Data, HalfClosed, Mux, Opened

_EPOCH, _PEER = 0x11111111, 0x22222222
_HELLO = frames.frame(frames.HELLO, _PEER, _EPOCH)
_WINDOW, _STREAMS = 4096, 16
#: One frame of the compact form: its kind's first letter decides.
_KINDS = (frames.OPEN, frames.ACCEPT, frames.REJECT, frames.WINDOW, frames.FIN, frames.RESET, frames.HELLO)


def _expand(data: bytes) -> bytes:
    """Return frames with right checks from a short form (4 bytes each), or what it says as it is."""
    out = bytearray()
    for at in range(0, len(data) - 3, 4):
        kind, stream, low, high = data[at : at + 4]
        if kind < 224:
            number = _KINDS[kind % len(_KINDS)]
            out += frames.frame(number, stream, _EPOCH if number == frames.HELLO and low else low | high << 8)
        elif kind < 248:
            out += b"".join(bytes(piece) for piece in frames.data_frame(stream, bytes(1 + (low | high << 8) % 5000)))
        else:
            out += data[at : at + 4]
    return bytes(out)


def case(data: bytes) -> None:
    if not data:
        return
    raw = data[1:] if data[0] & 1 else _expand(data[1:])
    if data[0] & 2:
        raw = _HELLO + raw
    step = (1, 16, 61, 4096)[data[0] >> 2 & 3]
    mux = Mux(True, window_bytes=_WINDOW, max_streams=_STREAMS, epoch=_EPOCH)
    mux.open(80)
    held: dict[int, int] = {}
    if step == 1:
        raw = raw[:4096]
    try:
        for at in range(0, len(raw), step):
            for event in mux.receive(raw[at : at + step]):
                if isinstance(event, Opened):
                    if event.port & 1:
                        mux.accept(event.stream)
                        mux.send(event.stream, b"welcome" * 100)
                    else:
                        mux.reject(event.stream)
                elif isinstance(event, Data):
                    held[event.stream] = held.get(event.stream, 0) + len(event.payload)
                    if event.stream & 2:
                        mux.consumed(event.stream, len(event.payload))
                    else:
                        assert held[event.stream] <= _WINDOW
                elif isinstance(event, HalfClosed):
                    mux.close_write(event.stream)
                else:
                    held.pop(event.stream, None)
            assert mux.streams <= _STREAMS
            if data[0] & 16:
                assert sum(map(len, mux.outgoing(1 << 16))) <= (1 << 16) + len(frames.FLUSH) + 200_000
    except ProtocolError:
        pass
    while mux.outgoing():
        pass


def seeds() -> Iterator[bytes]:
    frame = frames.frame
    opened = frame(frames.OPEN, 2, 81) + frame(frames.WINDOW, 2, 4096)
    talk = b"".join(bytes(piece) for piece in frames.data_frame(2, b"hello"))
    answer = frame(frames.ACCEPT, 1, 0) + frame(frames.WINDOW, 1, 100)
    yield bytes([3 | 12]) + opened + talk + frame(frames.FIN, 2, 0)
    yield bytes([3 | 4 | 16]) + answer + frame(frames.RESET, 1, 3) + frame(frames.OPEN, 4, 80)
    yield bytes([1 | 8]) + b"tail of a payload" + _HELLO + opened + b"garbage" * 4 + _HELLO + opened
    yield bytes([2 | 8]) + bytes([0, 2, 81, 0, 3, 2, 0, 16, 230, 2, 5, 0, 4, 2, 0, 0, 1, 1, 0, 0, 6, 9, 1, 0])
    yield bytes([2 | 12 | 16]) + b"".join(bytes([0, 2 * index, 81, 0]) for index in range(1, 40))
