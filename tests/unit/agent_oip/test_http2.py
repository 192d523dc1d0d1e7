"""gRPC's calls over HTTP/2 without sockets, with h2 as the client: messages, windows, refusals, time, abuse."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes
from hpack import Encoder

from fake_link import FakeLink
from fake_workers import FakeBlock
from remora.agent.hints import with_retry
from remora.agent.web import grpc
from remora.agent.web.http2 import Http2
from remora.agent.web.http2_frames import PREFACE, header
from remora.agent.web.http2_streams import GrpcExchange, take
from remora.errors import InvalidArgumentError, ProtocolError, ResourceExhaustedError, UnavailableError

CALL = [
    *((":method", "POST"), (":scheme", "http"), (":path", "/s.S/M"), (":authority", "x")),
    *(("content-type", "application/grpc"), ("te", "trailers")),
]


def released(block: FakeBlock) -> int:
    return block.released


class Ends:
    """An agent's connection and a client's, bytes carried between them by `turn`."""

    def __init__(self, *, room: int = 1 << 24, window: int = 0) -> None:
        self.link = FakeLink()
        self.exchanges: list[GrpcExchange] = []
        self.blocks: list[FakeBlock] = []
        self.now_s = 100.0
        self._room = room
        self.http2 = Http2(
            self.link,
            self.exchanges.append,
            scratch=memoryview(bytearray(16384)),
            allocate=self._allocate,
            max_body_bytes=1 << 20,
            max_streams=8,
            timeout_s=10.0,
            now_s=lambda: self.now_s,
        )
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.client.initiate_connection()
        if window:
            self.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.events: list[Any] = []
        self.turn()

    def _allocate(self, size: int) -> FakeBlock:
        if size > self._room:
            raise ResourceExhaustedError("no room")
        self.blocks.append(FakeBlock(size, lambda: None))
        return self.blocks[-1]

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            room = self.http2.get_buffer()
            piece = data[at : at + len(room)]
            room[: len(piece)] = piece
            at += len(piece)
            self.http2.received(len(piece))

    def turn(self) -> None:
        """Carry bytes both ways until nothing more is said."""
        while True:
            up = self.client.data_to_send()
            if up:
                self.feed(up)
            down, self.link.sent = bytes(self.link.sent), bytearray()
            if down:
                self.events += self.client.receive_data(down)
            if not up and not down:
                return

    def call(self, message: bytes, *more: tuple[str, str], end: bool = True) -> int:
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, [*CALL, *more])
        data = struct.pack(">BI", 0, len(message)) + message
        while data:
            piece = data[: min(len(data), self.client.local_flow_control_window(stream), 16384)]
            assert piece, "the agent's window is too small"
            data = data[len(piece) :]
            self.client.send_data(stream, piece, end_stream=end and not data)
            self.turn()
        return stream

    def answer(self, stream: int) -> tuple[bytes, dict[str, str]]:
        """Return what came on a stream: data, and headers with trailers."""
        body = b""
        found: dict[str, str] = {}
        for event in self.events:
            if getattr(event, "stream_id", None) != stream:
                continue
            if isinstance(event, events.DataReceived):
                body += event.data
            elif isinstance(event, events.ResponseReceived | events.TrailersReceived):
                found |= {str(name): str(value) for name, value in event.headers}
        return body, found


def test_a_message_goes_in_and_one_comes_out() -> None:
    ends = Ends()
    stream = ends.call(b"request", ("grpc-timeout", "5S"))
    (exchange,) = ends.exchanges
    assert (exchange.path, bytes(exchange.body), exchange.deadline_s) == ("/s.S/M", b"request", 105.0)
    assert exchange.respond([b"ans", memoryview(b"wer")])
    ends.turn()
    body, headers = ends.answer(stream)
    assert body == b"\0\0\0\0\6answer"
    assert (headers[":status"], headers["grpc-status"]) == ("200", "0")
    assert not exchange.respond([b"again"])


def test_a_large_message_lies_in_one_block_until_the_answer_is_sent() -> None:
    ends = Ends()
    ends.call(bytes(500_000))
    (block,) = ends.blocks
    ends.link.stuck = True
    ends.exchanges[0].respond([ends.exchanges[0].body])
    ends.turn()
    assert released(block) == 0
    ends.link.take()
    ends.turn()
    assert released(block) == 0  # the client's window is full: most of the answer waits here
    assert ends.http2.unsent_bytes > 0
    while ends.http2.unsent_bytes:
        ends.client.increment_flow_control_window(1 << 20)
        ends.client.increment_flow_control_window(1 << 20, stream_id=1)
        ends.turn()
    assert released(block) == 1
    assert len(ends.answer(1)[0]) == 500_005


def test_answers_share_the_clients_window_and_all_arrive() -> None:
    ends = Ends(window=1000)
    streams = [ends.call(b"x") for _ in range(4)]
    for number, exchange in enumerate(ends.exchanges):
        exchange.respond([bytes([number]) * 5000])
    for _ in range(10):
        ends.turn()
        for stream in streams:
            if stream in ends.client.streams and ends.client.streams[stream].open:
                ends.client.increment_flow_control_window(1000, stream_id=stream)
    ends.turn()
    for number, stream in enumerate(streams):
        assert ends.answer(stream)[0][5:] == bytes([number]) * 5000


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(":method", "GET"), *CALL[1:]], "405"),
        ([*CALL[:4], ("content-type", "application/json")], "415"),
    ],
)
def test_what_is_no_grpc_is_told_in_https_terms(headers: list[tuple[str, str]], status: str) -> None:
    ends = Ends()
    ends.client.send_headers(1, headers, end_stream=True)
    ends.turn()
    assert ends.answer(1)[1][":status"] == status


def send_raw(ends: Ends, data: bytes, *more: tuple[str, str]) -> dict[str, str]:
    ends.client.send_headers(1, [*CALL, *more])
    ends.client.send_data(1, data, end_stream=True)
    ends.turn()
    return ends.answer(1)[1]


def test_messages_that_are_not_accepted_are_refused_with_a_status() -> None:
    assert send_raw(Ends(), b"\1\0\0\0\0")["grpc-status"] == "12"
    assert send_raw(Ends(), b"\0\0\0\0\0", ("grpc-encoding", "gzip"))["grpc-status"] == "12"
    assert send_raw(Ends(), b"\0\0\x20\0\0")["grpc-status"] == "8"
    assert send_raw(Ends(room=0), b"\0\0\2\0\0" + bytes(100))["grpc-status"] == "8"
    for short in (b"", b"\0\0\0", b"\0\0\0\0\2x", b"\0\0\0\0\1xy"):
        assert send_raw(Ends(), short)["grpc-status"] == "3"
    assert send_raw(Ends(), b"\0\0\0\0\0", ("grpc-timeout", "soon"))["grpc-status"] == "3"


def test_a_refusal_says_when_to_come_back_in_both_ways() -> None:
    ends = Ends()
    stream = ends.call(b"")
    ends.exchanges[0].fail(with_retry(ResourceExhaustedError("too many\n100%"), 0.25))
    ends.turn()
    headers = ends.answer(stream)[1]
    assert headers["grpc-retry-pushback-ms"] == "250"
    assert headers["grpc-message"].startswith("too many%0A100%25")
    assert "grpc-status-details-bin" in headers
    assert dict(grpc.refusal_headers(InvalidArgumentError("x"))).keys() == {
        ":status",
        "content-type",
        "grpc-status",
        "grpc-message",
    }


def test_a_call_that_the_client_gives_up_is_cancelled_and_its_memory_goes() -> None:
    ends = Ends()
    stream = ends.call(bytes(100_000))
    reasons: list[Any] = []
    ends.exchanges[0].on_cancel(reasons.append)
    ends.client.reset_stream(stream)
    ends.turn()
    assert "gave the call up" in str(reasons[0])
    assert released(ends.blocks[0]) == 1
    half = Ends()
    half.call(bytes(100_000), end=False)
    half.http2.closed(UnavailableError("gone"))
    assert released(half.blocks[0]) == 1


def test_a_call_that_does_not_come_is_reset_and_others_go_on() -> None:
    ends = Ends()
    slow = ends.call(bytes(70_000), end=False)
    ends.now_s += 20
    fast = ends.call(b"x")
    ends.http2.check(ends.now_s)
    ends.turn()
    assert any(isinstance(event, events.StreamReset) and event.stream_id == slow for event in ends.events)
    ends.exchanges[0].respond([b"y"])
    ends.turn()
    assert ends.answer(fast)[0][5:] == b"y"


def test_a_client_that_never_settles_is_hung_up_on() -> None:
    link = FakeLink()
    http2 = Http2(
        link,
        lambda _exchange: None,
        scratch=memoryview(bytearray(16384)),
        allocate=lambda _size: FakeBlock(0, lambda: None),
        max_body_bytes=1 << 20,
        max_streams=8,
        timeout_s=10.0,
        now_s=lambda: 0.0,
    )
    assert http2.check(5.0) is not None
    assert http2.check(11.0) is None
    assert link.finished


def _settings(_ends: Ends) -> bytes:
    return header(0, 4, 0, 0)


def _resets(ends: Ends) -> bytes:
    stream = ends.client.get_next_available_stream_id()
    ends.client.send_headers(stream, CALL)
    ends.client.reset_stream(stream)
    return ends.client.data_to_send()


@pytest.mark.parametrize("attack", [_settings, _resets, lambda _ends: header(8, 6, 0, 0) + b"pingpong"])
def test_frames_that_ask_for_nothing_end_the_connection(attack: Callable[[Ends], bytes]) -> None:
    ends = Ends()
    for _ in range(5000):
        if ends.link.finished:
            break
        ends.feed(attack(ends))
        ends.link.sent.clear()
    assert ends.link.finished


def test_headers_that_unpack_to_much_more_than_was_sent_are_refused() -> None:
    """Each reference to a long entry of HPACK's table is one byte on the wire and 4 KiB in memory."""
    ends = Ends()
    encoder = Encoder()
    block = encoder.encode([*CALL, ("x", "y" * 3900)], huffman=False)
    block += b"\xbe" * 1000
    with pytest.raises(ProtocolError):
        ends.feed(header(len(block), 1, 5, 1) + block)
    assert not ends.exchanges


def test_headers_without_an_end_are_refused() -> None:
    ends = Ends()
    block = Encoder().encode(CALL)
    with pytest.raises(ProtocolError):
        ends.feed(header(len(block), 1, 0, 1) + block + (header(16000, 9, 0, 1) + bytes(16000)) * 200)


def test_bytes_that_are_no_http2_end_the_connection() -> None:
    ends = Ends()
    with pytest.raises(ProtocolError):
        ends.feed(PREFACE)
    assert ends.link.finished


def test_taking_bytes_off_a_queue_keeps_their_order() -> None:
    from collections import deque

    queue = deque(memoryview(piece) for piece in (b"abc", b"", b"defgh"))
    size, pieces = take(queue, 5)
    assert (size, b"".join(pieces), b"".join(queue)) == (5, b"abcde", b"fgh")
