"""HTTP/2's DATA frames, however they are cut, give a stream its bytes without padding; others come whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.web.exchange import Body
from remora.agent.web.http1_head import BadRequestError, parse
from remora.agent.web.http2_frames import PREFACE, FrameReader, header
from remora.errors import ProtocolError


class Taker:
    def __init__(self) -> None:
        self.controls: list[bytes] = []
        self.bytes = b""
        self.ended: list[tuple[int, int, bool]] = []

    def control(self, frame: bytes) -> None:
        self.controls.append(frame)

    def data(self, stream: int, payload: memoryview) -> None:
        self.bytes += bytes(payload)

    def data_ended(self, stream: int, size: int, *, end_stream: bool) -> None:
        self.ended.append((stream, size, end_stream))

    def body_of(self, stream: int) -> Body | None:
        return None


def feed(taker: Taker, raw: bytes, cuts: list[int]) -> None:
    reader = FrameReader(taker, memoryview(bytearray(16384)), len(PREFACE))
    position = 0
    for cut in [*cuts, len(raw)]:
        piece = raw[position : position + cut]
        if piece:
            reader.get_buffer()[: len(piece)] = piece
            reader.received(len(piece))
            position += len(piece)


@given(st.binary(max_size=300), st.integers(0, 255), st.lists(st.integers(1, 60), max_size=40))
def test_padding_is_taken_away_however_the_bytes_are_cut(payload: bytes, padding: int, cuts: list[int]) -> None:
    settings = header(0, 4, 0, 0)
    padded = bytes((padding,)) + payload + bytes(padding)
    raw = PREFACE + settings + header(len(padded), 0, 0x9, 5) + padded + header(len(payload), 0, 0, 5) + payload
    taker = Taker()
    feed(taker, raw, cuts)
    assert taker.controls == [PREFACE, settings]
    assert taker.bytes == payload * 2
    assert taker.ended == [(5, len(padded), True), (5, len(payload), False)]


@pytest.mark.parametrize("frame", [header(40000, 1, 0, 1), header(1, 0, 0x8, 1) + b"\xff", header(0, 0, 0x8, 1)])
def test_frames_that_cannot_be_are_refused_at_their_header(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(Taker(), PREFACE + frame, [])


@given(st.binary(max_size=400))
def test_any_head_is_parsed_or_refused(raw: bytes) -> None:
    status = 200
    try:
        parse(b"GET /" + raw)
    except BadRequestError as error:
        status = error.http_status
    assert status == 200 or 400 <= status < 500
