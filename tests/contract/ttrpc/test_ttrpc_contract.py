"""Every server with every client: what ttrpc promises, whoever speaks it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)
from remora.wire.ttrpc import core
from remora.wire.ttrpc.messages import Request, Response
from remora.wire.vaccel import ResourceBlob as Item

SERVICE = "test.v1.Contract"
MAX_MESSAGE_BYTES = 1 << 20
DEADLINE_S = 20.0

# -- unary ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 8000, 8192, 10_000, 65_536, 600_000, MAX_MESSAGE_BYTES - 200])
def test_a_message_of_any_size_comes_back_unchanged(client: Any, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    answer = client.call(SERVICE, "Echo", Item(name="ü", size=7, data=data[:size]), Item)
    assert answer == Item(name="ü", size=7, data=data[:size])


def test_an_empty_message_comes_back_as_defaults(client: Any) -> None:
    assert client.call(SERVICE, "Echo", Item(), Item) == Item()


def test_calls_of_many_threads_get_their_own_answers(client: Any) -> None:
    def work(start: int) -> None:
        for number in range(start, start + 40):
            data = bytes([number & 255]) * (number * 37 % 20_000)
            assert client.call(SERVICE, "Echo", Item(size=number, data=data), Item, timeout_s=DEADLINE_S).data == data

    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(work, start * 1000) for start in range(8)]:
            result.result()


def test_a_call_that_waits_does_not_hold_up_another(client: Any, server: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.call, SERVICE, "Wait", Item(), Item)
        assert server.state.waiting.wait(DEADLINE_S)
        assert client.call(SERVICE, "Echo", Item(size=1), Item, timeout_s=DEADLINE_S).size == 1
        client.close()
        with pytest.raises(UnavailableError):
            waiting.result(DEADLINE_S)


def test_an_error_arrives_with_its_class_message_and_details(client: Any) -> None:
    with pytest.raises(FailedPreconditionError, match="not like this") as caught:
        client.call(SERVICE, "Fail", Item(type_=9, name="not like this"), Item)
    assert [(detail.type_url, detail.value) for detail in caught.value.details] == [("type.test/detail", b"\x10\x5f")]


def test_after_an_error_the_connection_goes_on(client: Any) -> None:
    with pytest.raises(NotFoundError):
        client.call(SERVICE, "Fail", Item(type_=5, name="x"), Item)
    assert client.call(SERVICE, "Echo", Item(size=5), Item).size == 5


def test_an_unknown_method_is_named_in_the_error(client: Any) -> None:
    with pytest.raises(UnimplementedError, match="Nonesuch"):
        client.call(SERVICE, "Nonesuch", Item(), Item)
    with pytest.raises(UnimplementedError, match=r"no\.such\.Service"):
        client.call("no.such.Service", "Echo", Item(), Item)


def test_metadata_reaches_the_function_with_all_values_of_a_key(client: Any) -> None:
    metadata = {"a": "1", "key": ["x", "y"]}
    assert client.call(SERVICE, "Metadata", Item(name="key"), Item, metadata=metadata).name == "x,y"
    assert client.call(SERVICE, "Metadata", Item(name="none"), Item, metadata=metadata).name == ""


# -- deadlines and cancellation ---------------------------------------------------------------------------------------


def test_the_server_knows_the_callers_deadline(client: Any) -> None:
    assert client.call(SERVICE, "Metadata", Item(), Item).size == 0
    assert 1_000_000 < client.call(SERVICE, "Metadata", Item(), Item, timeout_s=10).size <= 10_000_000


def test_a_call_past_its_deadline_ends_at_both_ends(client: Any, server: Any) -> None:
    with pytest.raises(DeadlineExceededError):
        client.call(SERVICE, "Wait", Item(), Item, timeout_s=0.2)
    assert server.state.cancelled.wait(DEADLINE_S)
    assert client.call(SERVICE, "Echo", Item(size=3), Item).size == 3


def test_a_server_answers_an_expired_call_itself(server: Any) -> None:
    with server.connect() as sock:
        request = Request(service=SERVICE, method="Wait", timeout_nano=100_000_000)
        sock.sendall(frame(1, request.to_bytes()))
        assert read_response(sock)[1].status.code == 4  # type: ignore[union-attr]  # an error has a status


def test_closing_the_connection_cancels_its_calls(connect: Callable[[], Any], server: Any) -> None:
    client = connect()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, SERVICE, "Wait", Item(), Item)
        assert server.state.waiting.wait(DEADLINE_S)
        client.close()
        assert server.state.cancelled.wait(DEADLINE_S)
        with pytest.raises(UnavailableError):
            call.result(DEADLINE_S)
    with pytest.raises(UnavailableError):
        client.call(SERVICE, "Echo", Item(), Item)
    assert client.closed


# -- limits -----------------------------------------------------------------------------------------------------------


def test_an_oversized_request_is_refused_and_the_connection_goes_on(client: Any) -> None:
    with pytest.raises(ResourceExhaustedError, match=str(MAX_MESSAGE_BYTES)):
        client.call(SERVICE, "Echo", Item(data=bytes(3 * MAX_MESSAGE_BYTES)), Item, timeout_s=DEADLINE_S)
    assert client.call(SERVICE, "Echo", Item(size=9), Item).size == 9


def test_an_oversized_answer_is_refused_by_the_client_and_the_connection_goes_on(connect: Callable[..., Any]) -> None:
    client = connect(max_message_bytes=1000)
    with pytest.raises(ResourceExhaustedError, match="1000"):
        client.call(SERVICE, "Echo", Item(data=bytes(50_000)), Item, timeout_s=DEADLINE_S)
    assert client.call(SERVICE, "Echo", Item(size=9), Item).size == 9


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_client_stream_is_answered_after_its_last_message(client: Any) -> None:
    stream = client.stream(SERVICE, "Total", None, Item, client_streaming=True)
    for number in range(50):
        stream.send(Item(size=number, data=bytes(number * 100)))
    stream.close_send()
    assert stream.receive() == Item(size=sum(range(50)))
    assert stream.receive() is None


def test_a_client_streams_first_message_may_come_with_the_request(client: Any) -> None:
    stream = client.stream(SERVICE, "Total", Item(size=5), Item, client_streaming=True)
    stream.send(Item(size=6))
    stream.close_send()
    assert stream.receive() == Item(size=11)


def test_a_server_stream_arrives_in_order_and_ends(client: Any) -> None:
    stream = client.stream(SERVICE, "Count", Item(size=100, data=b"x" * 2000), Item, server_streaming=True)
    assert [stream.receive().size for _ in range(100)] == list(range(100))
    assert stream.receive() is None


def test_a_server_stream_may_end_with_an_error(client: Any) -> None:
    stream = client.stream(SERVICE, "Count", Item(size=2, type_=5, name="gone"), Item, server_streaming=True)
    assert [stream.receive().size for _ in range(2)] == [0, 1]
    with pytest.raises(NotFoundError, match="gone"):
        stream.receive()


def test_both_ends_may_stream_at_once(client: Any) -> None:
    stream = client.stream(SERVICE, "Chat", None, Item, client_streaming=True, server_streaming=True)
    for number in range(20):
        stream.send(Item(size=number))
        assert stream.receive() == Item(size=number + 1)
    stream.send(Item(size=1, data=bytes(300_000)))
    stream.close_send()
    assert len(stream.receive().data) == 300_000
    assert stream.receive() is None


def test_a_stream_whose_answers_are_not_read_yet_does_not_deadlock(client: Any) -> None:
    """The client sends far more than all buffers hold while the server answers each message."""
    stream = client.stream(SERVICE, "Chat", None, Item, client_streaming=True, server_streaming=True, timeout_s=20)
    for number in range(100):
        stream.send(Item(size=number, data=bytes(100_000)))
    stream.close_send()
    assert [stream.receive().size for _ in range(100)] == list(range(1, 101))
    assert stream.receive() is None


def test_streams_and_calls_share_a_connection(client: Any) -> None:
    stream = client.stream(SERVICE, "Total", None, Item, client_streaming=True)
    stream.send(Item(size=1))
    assert client.call(SERVICE, "Echo", Item(size=2), Item).size == 2
    stream.close_send()
    assert stream.receive().size == 1


# -- raw bytes against each server ------------------------------------------------------------------------------------


def frame(stream_id: int, body: bytes, *, kind: int = 1, flags: int = 0) -> bytes:
    return struct.pack(">IIBB", len(body), stream_id, kind, flags) + body


def echo_request(size: int = 1) -> bytes:
    return Request(service=SERVICE, method="Echo", payload=Item(size=size).to_bytes()).to_bytes()


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def read_response(sock: socket.socket) -> tuple[int, Response]:
    length, stream_id, kind, _flags = struct.unpack(">IIBB", read_exactly(sock, 10))
    assert kind == 2
    return stream_id, Response.decode(read_exactly(sock, length))


def code_of(response: Response) -> int:
    return 0 if response.status is None else response.status.code


def test_a_frame_may_arrive_byte_by_byte(server: Any) -> None:
    with server.connect() as sock:
        for byte in frame(1, echo_request()):
            sock.sendall(bytes([byte]))
        stream_id, response = read_response(sock)
        assert (stream_id, code_of(response), Item.decode(response.payload)) == (1, 0, Item(size=1))


def test_many_frames_may_arrive_at_once(server: Any) -> None:
    with server.connect() as sock:
        sock.sendall(b"".join(frame(2 * number + 1, echo_request(number)) for number in range(200)))
        answers = dict(read_response(sock) for _ in range(200))
        assert all(Item.decode(answers[2 * number + 1].payload).size == number for number in range(200))


@pytest.mark.parametrize(("ids", "refused"), [([2], 2), ([5, 5], 5), ([5, 3], 3), ([0], 0)])
def test_even_repeated_and_shrinking_stream_ids_are_refused(server: Any, ids: list[int], refused: int) -> None:
    with server.connect() as sock:
        for number in ids:
            sock.sendall(frame(number, echo_request()))
        codes = [(stream_id, code_of(response)) for stream_id, response in (read_response(sock) for _ in ids)]
        assert (refused, 3) in codes
        sock.sendall(frame(7, echo_request()))
        assert code_of(read_response(sock)[1]) == 0


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x7f", b"\x12\x02\xff\xff", b"\x0a\x03abc\x1a\x7f", b"\x0a"])
def test_an_undecodable_envelope_is_an_invalid_argument(server: Any, body: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(frame(1, body))
        assert code_of(read_response(sock)[1]) == 3


def test_an_undecodable_payload_is_an_error_of_its_call_only(server: Any) -> None:
    with server.connect() as sock:
        request = Request(service=SERVICE, method="Echo", payload=b"\xff\xff")
        sock.sendall(frame(1, request.to_bytes()))
        assert code_of(read_response(sock)[1]) == 3
        sock.sendall(frame(3, echo_request()))
        assert code_of(read_response(sock)[1]) == 0


@pytest.mark.parametrize("data", [frame(1, b"", kind=9), frame(1, b"", kind=2), b"GET / HTTP/1.1\r\n\r\n"])
def test_who_does_not_speak_ttrpc_is_disconnected(server: Any, data: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(data)
        assert sock.recv(1) == b""


def test_the_stream_of_a_vaccel_client_is_understood(server: Any) -> None:
    """Request with flags 0x06 and an empty payload, data frames, an empty frame with flags 0x05 (vaccel.md, 3)."""
    with server.connect() as sock:
        sock.sendall(frame(1, Request(service=SERVICE, method="Total").to_bytes(), flags=6))
        sock.sendall(frame(1, Item(size=4).to_bytes(), kind=3))
        sock.sendall(frame(1, Item(size=5).to_bytes(), kind=3))
        sock.sendall(frame(1, b"", kind=3, flags=5))
        assert Item.decode(read_response(sock)[1].payload).size == 9


def test_data_after_the_end_of_a_stream_fails_the_call(server: Any) -> None:
    with server.connect() as sock:
        sock.sendall(frame(1, Request(service=SERVICE, method="Wait").to_bytes()))
        sock.sendall(frame(1, Item(size=4).to_bytes(), kind=3))
        assert code_of(read_response(sock)[1]) == 3


def test_an_oversized_body_is_answered_before_it_has_arrived(server: Any) -> None:
    with server.connect() as sock:
        sock.sendall(struct.pack(">IIBB", 0xFFFFFFF0, 1, 1, 0))
        assert code_of(read_response(sock)[1]) == 8


def test_clients_that_vanish_leave_nothing(server: Any) -> None:
    before = threading.active_count()
    for data in (b"", b"\0\0\0", frame(1, echo_request())[:-1], frame(1, echo_request()), b"\0\x0f\0\0" + b"\0" * 6):
        sock = server.connect()
        sock.sendall(data)
        sock.close()
    with server.connect() as sock:
        sock.sendall(frame(1, echo_request()))
        assert code_of(read_response(sock)[1]) == 0
    assert threading.active_count() <= before + 2


def test_a_response_with_an_unknown_code_is_an_internal_error() -> None:
    body = Response.decode(b"\x0a\x02\x08\x63").to_bytes()
    with pytest.raises(RemoraError) as caught:
        core.response_payload(body)
    assert caught.value.code == 13
