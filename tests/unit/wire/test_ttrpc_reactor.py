"""What one peer may cost the reactor's server, and how calls and their memory end."""

from __future__ import annotations

import gc
import resource
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.wire.protobuf import DecodeError
from remora.wire.remora_v1 import NoopRequest, NoopResponse
from remora.wire.ttrpc.core import data_frame, request_frame
from remora.wire.ttrpc.frames import HeapBlock
from remora.wire.ttrpc.messages import Response
from remora.wire.ttrpc.reactor import Call, ServerConnection, listen


class Bench:
    """A reactor that the test turns by hand, and client ends that never block for long."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        self.calls: list[Call] = []
        self.closed: list[ServerConnection] = []
        self.clients: list[socket.socket] = []

    def connect(self, handler: Callable[[Call], None] | None = None, **options: Any) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        self.clients.append(ours)
        self.connection = ServerConnection(
            self.reactor, theirs, handler or self.calls.append, on_close=self.closed.append, **options
        )
        return ours

    def wait(self, until: Callable[[], bool], limit_s: float = 10) -> None:
        end_s = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < end_s, "did not happen"
            self.reactor.run_once(0.05)

    def rest(self) -> None:
        """Run until the reactor finds nothing ready."""
        for _ in range(50):
            self.reactor.run_once(0)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.rest()
        self.reactor.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def request(stream: int, body: bytes = b"", **options: Any) -> bytes:
    return b"".join(request_frame(stream, "s", "M", NoopRequest(data=body), **options))


def read_response(sock: socket.socket) -> tuple[int, Response]:
    size, stream, _kind, _flags = struct.unpack(">IIBB", sock.recv(10, socket.MSG_WAITALL))
    return stream, Response.decode(sock.recv(size, socket.MSG_WAITALL))


def echo(call: Call) -> None:
    call.respond(NoopResponse(data=NoopRequest.decode(call.payload).data))


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_connection_with_many_open_calls_is_not_read_until_some_are_answered(bench: Bench) -> None:
    client = bench.connect(max_in_flight=4)
    for number in range(12):
        client.sendall(request(2 * number + 1, bytes(5000)))  # one frame for each 8 KiB read, or two
        bench.rest()
    assert 4 <= len(bench.calls) <= 6
    for call in list(bench.calls):
        call.respond(NoopResponse())
    bench.rest()
    assert 8 <= len(bench.calls) <= 12


def test_who_does_not_read_answers_is_not_read_and_then_closed(bench: Bench) -> None:
    client = bench.connect(echo, max_out_bytes=100_000, send_timeout_s=0.3)
    client.setblocking(False)
    sent = 0
    stream = 1
    blocked = 0
    while blocked < 20 and not bench.closed:
        try:
            sent += client.send(request(stream, bytes(50_000)))
            stream += 2
            blocked = 0
        except BlockingIOError:
            blocked += 1
        bench.rest()
        if not bench.closed:
            assert bench.connection.out_bytes < 400_000
    bench.wait(lambda: bool(bench.closed))
    assert sent < 4 << 20


def test_who_stops_in_the_middle_of_a_frame_is_closed(bench: Bench) -> None:
    client = bench.connect(echo, frame_timeout_s=0.2)
    client.sendall(request(1, b"whole"))
    bench.rest()
    assert read_response(client)[0] == 1
    client.sendall(request(3)[:7])
    bench.wait(lambda: bool(bench.closed))
    assert client.recv(1) == b""


def test_a_slow_sender_that_drips_bytes_is_closed_too(bench: Bench) -> None:
    client = bench.connect(echo, frame_timeout_s=0.2)
    data = request(1, bytes(200))
    for byte in data:
        if bench.closed:
            break
        client.send(bytes([byte]))
        bench.rest()
        bench.reactor.run_once(0.005)  # nothing comes: time passes
    assert bench.closed


def test_an_idle_connection_stays(bench: Bench) -> None:
    client = bench.connect(echo, frame_timeout_s=0.05, send_timeout_s=0.05)
    end_s = time.monotonic() + 0.2
    while time.monotonic() < end_s:
        bench.reactor.run_once(0.02)
    client.sendall(request(1))
    bench.rest()
    assert read_response(client)[0] == 1


def test_an_idle_connection_costs_less_than_4_kib(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        for _ in range(10):
            bench.connect(echo)
        pairs = [socket.socketpair() for _ in range(300)]
        gc.collect()
        tracemalloc.start()
        connections = [ServerConnection(bench.reactor, theirs, echo) for _ours, theirs in pairs]
        for ours, _theirs in pairs:
            ours.sendall(request(1, b"x" * 100))
        for _ in range(20):
            bench.reactor.run_once(0)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for ours, _theirs in pairs:
            ours.close()
        bench.wait(lambda: all(connection.closed for connection in connections))
        assert used / len(pairs) < 4096
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_beyond_the_bound_are_refused(bench: Bench) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen(10)
    listener = listen(
        bench.reactor, sock, lambda accepted: ServerConnection(bench.reactor, accepted, echo), max_connections=2
    )
    clients = []
    for _ in range(3):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(sock.getsockname())
        clients.append(client)
    bench.rest()
    assert clients[2].recv(1) == b""
    clients[0].close()
    bench.wait(lambda: len(listener.connections) == 1)
    again = socket.socket(socket.AF_UNIX)
    again.settimeout(5)
    again.connect(sock.getsockname())
    again.sendall(request(1))
    bench.rest()
    assert read_response(again)[0] == 1
    listener.close()
    for client in (*clients, again):
        client.close()


# -- calls ------------------------------------------------------------------------------------------------------------


class Counted(HeapBlock):
    __slots__ = ()
    live = 0

    def __init__(self, size: int) -> None:
        super().__init__(size)
        Counted.live += 1

    def release(self) -> None:
        Counted.live -= 1


@pytest.fixture
def counted() -> type[Counted]:
    Counted.live = 0
    return Counted


def test_a_requests_block_lives_until_its_answer_is_sent(bench: Bench, counted: type[Counted]) -> None:
    client = bench.connect(allocate=counted)
    client.setblocking(False)
    data = request(1, bytes(150_000))
    client.send(data)
    bench.wait(lambda: len(bench.calls) == 1)
    assert counted.live == 1
    sent: list[bool] = []
    bench.calls[0].respond([bench.calls[0].payload] * 20, on_sent=lambda: sent.append(True))
    assert counted.live == 1
    assert not sent
    while not sent:
        try:
            client.recv(1 << 20)
        except BlockingIOError:
            pass
        bench.rest()
    assert counted.live == 0


def test_a_retained_block_outlives_its_connection(bench: Bench, counted: type[Counted]) -> None:
    client = bench.connect(allocate=counted)
    client.sendall(request(1, bytes(100_000)))
    bench.wait(lambda: len(bench.calls) == 1)
    call = bench.calls[0]
    call.retain()
    reasons: list[RemoraError] = []
    call.on_cancel(reasons.append)
    client.close()
    bench.wait(lambda: bool(bench.closed))
    assert len(reasons) == 1
    assert counted.live == 1
    call.release()
    assert counted.live == 0
    late: list[bool] = []
    assert call.respond(NoopResponse(), on_sent=lambda: late.append(True)) is False
    assert late == [True]


def test_a_half_received_block_is_given_back_when_the_peer_goes(bench: Bench, counted: type[Counted]) -> None:
    client = bench.connect(allocate=counted)
    client.sendall(request(1, bytes(100_000))[:50_000])
    bench.rest()
    assert counted.live == 1
    client.close()
    bench.wait(lambda: bool(bench.closed))
    assert counted.live == 0


def test_a_second_answer_is_not_sent(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(request(1) + request(3))
    bench.wait(lambda: len(bench.calls) == 2)
    assert bench.calls[0].respond(NoopResponse()) is True
    assert bench.calls[0].respond(NoopResponse()) is False
    bench.calls[1].respond(NoopResponse())
    assert [read_response(client)[0], read_response(client)[0]] == [1, 3]


def test_a_fault_in_a_handler_is_answered_and_reported_and_others_go_on(bench: Bench) -> None:
    def handler(call: Call) -> None:
        if call.stream_id == 1:
            raise ValueError("a bug")
        echo(call)

    client = bench.connect(handler)
    client.sendall(request(1) + request(3))
    bench.rest()
    stream, response = read_response(client)
    assert stream == 1
    assert response.status is not None
    assert response.status.code == 13
    assert "a bug" not in response.status.message
    assert read_response(client)[0] == 3
    assert [type(error) for error in bench.errors] == [ValueError]


def test_deadlines_are_kept_in_any_order(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(request(1, timeout_s=0.3) + request(3, timeout_s=0.1) + request(5) + request(7, timeout_s=0.2))
    bench.wait(lambda: len(bench.calls) == 4)
    bench.wait(lambda: bench.connection.in_flight == 1)
    answers = [read_response(client) for _ in range(3)]
    assert [stream for stream, _ in answers] == [3, 7, 1]
    assert all(response.status is not None and response.status.code == 4 for _, response in answers)


def test_a_handler_that_pauses_its_client_is_not_fed(bench: Bench) -> None:
    got: list[bytes] = []

    def handler(call: Call) -> None:
        def take(payload: bytes | memoryview, release: Callable[[], None]) -> None:
            got.append(bytes(payload))
            release()
            bench.connection.pause()

        call.on_message = take

    client = bench.connect(handler)
    client.sendall(b"".join(request_frame(1, "s", "M", None, flags=2)))
    bench.rest()
    for _ in range(3):
        client.sendall(b"".join(data_frame(1, [bytes(8000)])))
        bench.rest()
    assert len(got) == 1
    bench.connection.resume()
    bench.rest()
    assert len(got) == 2


@pytest.mark.parametrize(("fault", "code"), [(ValueError("a bug"), 13), (DecodeError("no message"), 3)])
def test_a_fault_while_a_stream_is_received_ends_only_its_call(bench: Bench, fault: Exception, code: int) -> None:
    def handler(call: Call) -> None:
        def take(_payload: bytes | memoryview, _release: Callable[[], None]) -> None:
            raise fault

        if call.client_open:
            call.on_message = take
        else:
            echo(call)

    client = bench.connect(handler)
    client.sendall(
        b"".join([*request_frame(1, "s", "M", None, flags=2), *data_frame(1, [b"x"]), *data_frame(1, [b"y"])])
        + request(3)
    )
    bench.rest()
    stream, response = read_response(client)
    assert stream == 1
    assert response.status is not None
    assert response.status.code == code
    assert read_response(client)[0] == 3


def test_a_fault_in_one_cancel_callback_does_not_keep_others_from_being_called(bench: Bench) -> None:
    told: list[int] = []

    def handler(call: Call) -> None:
        def cancelled(_reason: RemoraError) -> None:
            told.append(call.stream_id)
            raise ValueError("a bug")

        call.on_cancel(cancelled)

    client = bench.connect(handler)
    client.sendall(request(1) + request(3))
    bench.rest()
    client.close()
    bench.wait(lambda: bool(bench.closed))
    assert told == [1, 3]
    assert len(bench.errors) == 2
