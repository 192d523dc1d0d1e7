"""The blocking client under threads: who reads for whom, and what everybody gets when it ends."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from remora.errors import DeadlineExceededError, ProtocolError, ResourceExhaustedError, UnavailableError
from remora.wire.remora_v1 import NoopRequest, NoopResponse
from remora.wire.ttrpc.core import data_frame, response_frame
from remora.wire.ttrpc.messages import Request
from remora.wire.ttrpc.sync import Client

DEADLINE_S = 20.0


class Peer:
    """The server's end, played by the test."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(DEADLINE_S)
        self.client = Client(ours)

    def read(self) -> tuple[int, NoopRequest]:
        head = self.sock.recv(10, socket.MSG_WAITALL)
        if len(head) < 10:
            raise EOFError
        size, stream, kind, _flags = struct.unpack(">IIBB", head)
        assert kind == 1
        request = Request.decode(self.sock.recv(size, socket.MSG_WAITALL))
        return stream, NoopRequest.decode(request.payload)

    def answer(self, stream: int, request: NoopRequest) -> None:
        self.sock.sendall(b"".join(response_frame(stream, NoopResponse(data=request.data))))

    def call(self, data: bytes = b"", **options: float) -> NoopResponse:
        return self.client.call("s", "M", NoopRequest(data=data), NoopResponse, **options)  # type: ignore[arg-type]


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with peer.sock, peer.client:
        yield peer


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_answers_in_any_order_reach_their_callers(peer: Peer) -> None:
    def serve() -> None:
        rng = random.Random(1)
        open_calls: list[tuple[int, NoopRequest]] = []
        done = 0
        while done < 8 * 50:
            readable = bool(select.select([peer.sock], [], [], 0)[0])
            if readable and (not open_calls or rng.random() < 0.7):
                open_calls.append(peer.read())
            elif open_calls:
                peer.answer(*open_calls.pop(rng.randrange(len(open_calls))))
                done += 1
            else:
                select.select([peer.sock], [], [], DEADLINE_S)

    server = in_thread(serve)

    def work(who: int) -> None:
        for number in range(50):
            data = f"{who} {number}".encode()
            assert peer.call(data).data == data

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, who) for who in range(8)]
        for future in futures:
            future.result(DEADLINE_S)
    server.join(DEADLINE_S)


def test_a_leader_whose_deadline_passes_hands_the_lead_to_another(peer: Peer) -> None:
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(peer.call, b"leader", timeout_s=0.3)
        first = peer.read()
        follower = pool.submit(peer.call, b"follower")
        second = peer.read()
        with pytest.raises(DeadlineExceededError):
            leader.result(DEADLINE_S)
        peer.answer(*first)  # too late: dropped
        peer.answer(*second)
        assert follower.result(DEADLINE_S).data == b"follower"


def test_a_follower_keeps_its_own_deadline(peer: Peer) -> None:
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(peer.call, b"leader")
        first = peer.read()
        follower = pool.submit(peer.call, b"follower", timeout_s=0.2)
        with pytest.raises(DeadlineExceededError):
            follower.result(DEADLINE_S)
        peer.answer(*first)
        assert leader.result(DEADLINE_S).data == b"leader"


@pytest.mark.parametrize("close", ["peer", "client"])
def test_when_the_connection_ends_every_waiting_call_ends(peer: Peer, close: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(peer.call) for _ in range(4)]
        for _ in calls:
            peer.read()
        if close == "peer":
            peer.sock.close()
        else:
            peer.client.close()
        for call in calls:
            with pytest.raises(UnavailableError):
                call.result(DEADLINE_S)
    assert peer.client.closed
    with pytest.raises(UnavailableError):
        peer.call()


def test_a_request_that_cannot_be_sent_whole_in_time_ends_the_connection(peer: Peer) -> None:
    with pytest.raises(DeadlineExceededError):
        peer.call(bytes(4 << 20), timeout_s=0.2)
    assert peer.client.closed


def test_a_request_with_a_wrong_field_costs_nobody_anything(peer: Peer) -> None:
    with pytest.raises(ValueError, match="boom"):
        peer.client.call("s", "M", _Exploding(), NoopResponse)
    server = in_thread(lambda: peer.answer(*peer.read()))
    assert peer.call(b"x").data == b"x"
    server.join()


class _Exploding(NoopRequest):
    def encode_to(self, out: list[bytes | memoryview]) -> None:
        raise ValueError("boom")


@pytest.mark.parametrize("data", [b"\0\0\0\0\0\0\0\1\1\0", b"HTTP/1.1 400 Bad Request\r\n"])
def test_a_server_that_does_not_speak_ttrpc_is_left(peer: Peer, data: bytes) -> None:
    peer.sock.sendall(data)
    with pytest.raises(ProtocolError):
        peer.call()
    assert peer.client.closed


def test_data_for_a_unary_call_ends_only_that_call(peer: Peer) -> None:
    def serve() -> None:
        stream, _request = peer.read()
        peer.sock.sendall(b"".join(data_frame(stream, [b"x"])))
        peer.answer(*peer.read())

    server = in_thread(serve)
    with pytest.raises(ProtocolError, match="not streaming"):
        peer.call()
    assert peer.call(b"y").data == b"y"
    server.join()


def test_a_stream_that_nobody_reads_is_bounded(peer: Peer) -> None:
    peer.client._streams._max_unread_bytes = 1000
    stream = peer.client.stream("s", "M", NoopRequest(), NoopResponse, server_streaming=True)
    number, _request = peer.read()
    for _ in range(3):
        peer.sock.sendall(b"".join(data_frame(number, NoopResponse(data=bytes(600)))))
    server = in_thread(lambda: peer.answer(*peer.read()))
    assert peer.call(b"other").data == b"other"
    server.join()
    stream.receive()
    stream.receive()
    with pytest.raises(ResourceExhaustedError):
        stream.receive()


def test_ids_on_the_wire_grow_whoever_calls(peer: Peer) -> None:
    seen: list[int] = []

    def serve() -> None:
        for _ in range(200):
            stream, request = peer.read()
            seen.append(stream)
            peer.answer(stream, request)

    server = in_thread(serve)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _number: peer.call(), range(200)))
    server.join()
    assert seen == list(range(1, 401, 2))


def test_deadlines_and_closing_leave_no_thread_waiting(peer: Peer) -> None:
    start_s = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(peer.call, timeout_s=0.1 + 0.05 * number) for number in range(6)]
        for call in calls:
            with pytest.raises(DeadlineExceededError):
                call.result(DEADLINE_S)
    assert time.monotonic() - start_s < 5
