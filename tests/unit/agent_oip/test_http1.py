"""HTTP/1.1 without sockets: requests in pieces, pipelining, bodies with and without room, time, and the strict head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_link import FakeLink
from fake_workers import FakeBlock
from remora.agent.hints import with_retry
from remora.agent.web.http1 import Http1, Http1Exchange, refusal
from remora.agent.web.http1_head import MAX_HEAD_BYTES, BadRequestError, header_number, parse
from remora.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


def released(block: FakeBlock) -> int:
    return block.released


class Ends:
    """A connection and what reached its handler."""

    def __init__(self, *, room: int = 1 << 20) -> None:
        self.link = FakeLink()
        self.exchanges: list[Http1Exchange] = []
        self.bodies: list[bytes] = []
        self.soon: list[Callable[[], None]] = []
        self.blocks: list[FakeBlock] = []
        self.now_s = 100.0
        self._room = room
        self.http1 = Http1(
            self.link,
            self._handle,
            scratch=memoryview(bytearray(8192)),
            allocate=self._allocate,
            max_body_bytes=1 << 20,
            timeout_s=10.0,
            now_s=lambda: self.now_s,
            call_soon=self.soon.append,
        )

    def _handle(self, exchange: Http1Exchange) -> None:
        self.exchanges.append(exchange)
        self.bodies.append(bytes(exchange.body))

    def _allocate(self, size: int) -> FakeBlock:
        if size > self._room:
            raise ResourceExhaustedError("no room")
        self.blocks.append(FakeBlock(size, lambda: None))
        return self.blocks[-1]

    def feed(self, data: bytes, step: int = 8192) -> None:
        at = 0
        while at < len(data):
            room = self.http1.get_buffer()
            piece = data[at : at + min(step, len(room))]
            room[: len(piece)] = piece
            at += len(piece)
            self.http1.received(len(piece))

    def run_soon(self) -> None:
        while self.soon:
            self.soon.pop(0)()


def post(body: bytes, *more: str) -> bytes:
    head = "\r\n".join(["POST /b HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more, "", ""])
    return head.encode() + body


@given(st.integers(1, 200), st.binary(max_size=300))
def test_a_request_may_come_in_any_pieces(step: int, body: bytes) -> None:
    ends = Ends()
    ends.feed(post(body), step)
    assert ends.bodies == [body]
    assert ends.exchanges[0].path == ("b",)
    assert ends.link.holding


def test_pipelined_requests_are_answered_one_after_the_other() -> None:
    ends = Ends()
    ends.feed(GET + post(b"two") + GET)
    assert len(ends.exchanges) == 1
    for number in range(3):
        ends.exchanges[number].respond(200, [b"%d" % number])
        ends.run_soon()
    assert [exchange.verb for exchange in ends.exchanges] == ["GET", "POST", "GET"]
    assert ends.link.sent.count(b"HTTP/1.1 200 OK") == 3
    assert not ends.link.holding


def test_many_small_requests_do_not_nest() -> None:
    ends = Ends()
    ends.feed(GET * 200)
    for number in range(200):
        ends.exchanges[number].respond(200, [])
        ends.run_soon()
    assert len(ends.exchanges) == 200


def test_a_large_body_lies_in_one_block_until_the_answer_is_sent() -> None:
    ends = Ends()
    ends.feed(post(bytes(100_000), "Inference-Header-Content-Length: 10"))
    (exchange,), (block,) = ends.exchanges, ends.blocks
    ends.link.stuck = True
    exchange.respond(200, [exchange.body])
    assert released(block) == 0
    ends.link.take()
    assert released(block) == 1
    assert ends.link.sent.endswith(bytes(100_000))


def test_a_body_without_room_goes_by_and_the_connection_stays() -> None:
    ends = Ends(room=0)
    ends.feed(post(bytes(100_000)) + GET, step=7000)
    ends.run_soon()
    assert ends.link.sent.startswith(b"HTTP/1.1 429 ")
    assert b"Retry-After: 1" in ends.link.sent
    assert len(ends.exchanges) == 1


def test_a_body_beyond_the_limit_is_refused_before_it_comes() -> None:
    ends = Ends()
    ends.feed(b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
    assert ends.link.sent.startswith(b"HTTP/1.1 413 ")
    assert b"Retry-After" not in ends.link.sent
    assert ends.link.finished


def test_whoever_expects_a_continue_gets_it_or_the_refusal() -> None:
    ends = Ends()
    ends.feed(post(b"", "Expect: 100-continue").replace(b"Content-Length: 0", b"Content-Length: 4"))
    assert bytes(ends.link.sent) == b"HTTP/1.1 100 Continue\r\n\r\n"
    ends.feed(b"body")
    assert ends.bodies == [b"body"]
    refused = Ends()
    refused.feed(b"POST /b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
    assert refused.link.sent.startswith(b"HTTP/1.1 413 ")


def test_head_has_the_length_and_no_body() -> None:
    ends = Ends()
    ends.feed(b"HEAD /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    ends.exchanges[0].respond(200, [b"body"])
    assert b"Content-Length: 4" in ends.link.sent
    assert ends.link.sent.endswith(b"\r\n\r\n")
    assert ends.link.finished


def test_a_request_that_does_not_come_is_timed_out_and_its_memory_goes() -> None:
    ends = Ends()
    ends.feed(post(bytes(100_000))[:-1])
    assert ends.http1.check(105.0) == pytest.approx(110.0 + 100_000 / 65536)
    assert ends.http1.check(200.0) is None
    assert ends.link.sent.startswith(b"HTTP/1.1 408 ")
    assert released(ends.blocks[0]) == 1


def test_a_lost_connection_cancels_what_is_asked_and_frees_what_came() -> None:
    ends = Ends()
    reasons: list[Any] = []
    ends.feed(post(bytes(100_000)))
    ends.exchanges[0].on_cancel(reasons.append)
    ends.http1.closed(UnavailableError("gone"))
    assert str(reasons[0]) == "gone"
    assert released(ends.blocks[0]) == 1
    sent: list[bool] = []
    assert not ends.exchanges[0].respond(200, [b"late"], on_sent=lambda: sent.append(True))
    assert sent == [True]
    assert not ends.link.sent
    half = Ends()
    half.feed(post(bytes(100_000))[:-1])
    half.http1.closed(UnavailableError("gone"))
    assert released(half.blocks[0]) == 1


def test_a_refusal_says_when_to_come_back() -> None:
    ends = Ends()
    ends.feed(GET)
    ends.exchanges[0].fail(with_retry(ResourceExhaustedError("too many"), 2.3))
    assert b"Retry-After: 3\r\n" in ends.link.sent
    assert b"Retry-After: 1\r\n" in refusal(UnavailableError("full"))
    assert b"Retry-After" not in refusal(InvalidArgumentError("wrong"))


# -- the head ---------------------------------------------------------------------------------------------------------


def test_a_head_is_read() -> None:
    head = parse(b"GET http://host/a%20b/c?q=1#f HTTP/1.1\r\nHost: x\r\nX-Y:  z \r\nx-y: w\r\nConnection: Close")
    assert head.path == ("a b", "c")
    assert head.headers["x-y"] == "z, w"
    assert not head.keep_alive
    assert parse(b"GET / HTTP/1.0\r\nConnection: keep-alive").keep_alive
    assert not parse(b"GET / HTTP/1.0").keep_alive
    assert parse(b"GET http://host HTTP/1.1\r\nHost: x").path == ("",)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /", 400),
        (b"GET  / HTTP/1.1\r\nHost: x", 400),
        (b"GET / HTTP/2.0\r\nHost: x", 400),
        (b"GET x HTTP/1.1\r\nHost: x", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: x", 400),
        (b"GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\nX: y", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX : y", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: +1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked", 411),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: more", 417),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join([b"A: b"] * 101), 431),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(raw)
    assert caught.value.http_status == status


@pytest.mark.parametrize("raw", [b"x" * (MAX_HEAD_BYTES + 1), b"GET / HTTP/1.1\n\n", b"\0"])
def test_what_will_never_be_a_head_is_refused_at_once(raw: bytes) -> None:
    ends = Ends()
    feed = partial(ends.feed, raw)
    feed()
    assert ends.link.sent.startswith(b"HTTP/1.1 4")
    assert ends.link.finished


@pytest.mark.parametrize("text", ["", "-1", "1.0", "1 2", "9" * 19])
def test_a_number_in_a_header_is_digits(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        header_number({"n": text}, "n")
    assert header_number({}, "n") is None
    assert header_number({"n": "7"}, "n") == 7


def test_requests_that_come_in_one_piece_with_the_first_are_answered_in_turn() -> None:
    ends = Ends()
    many = b"".join(GET.replace(b"/a", b"/%d" % number) for number in range(3)) + post(b"x" * 5000) * 2
    ends.feed(many)  # as a connection passes on what it read before it knew the protocol: held or not
    order: list[str] = []
    while len(order) < len(ends.exchanges):
        assert len(ends.exchanges) == len(order) + 1, "the next one is begun only when the last is answered"
        order.append(ends.exchanges[-1].path[0])
        ends.exchanges[-1].respond(200, [b"ok"])
        ends.run_soon()
    assert order == ["0", "1", "2", "b", "b"]


def test_a_request_that_is_answered_at_once_does_not_have_the_next_begun_twice() -> None:
    ends = Ends()
    ends.feed(GET + GET.replace(b"/a", b"/b"))
    ends.exchanges[0].respond(200, [b"ok"])
    ends.feed(GET.replace(b"/a", b"/c"))  # before the loop came to what waited
    ends.run_soon()
    while not ends.exchanges[-1].ended:
        ends.exchanges[-1].respond(200, [b"ok"])
        ends.run_soon()
    assert [exchange.path[0] for exchange in ends.exchanges] == ["a", "b", "c"]
