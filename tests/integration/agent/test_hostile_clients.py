"""A client that means harm: whatever it sends, the agent answers or hangs up, serves the others, and stays small."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from agent_process import AgentProcess, Guest, wait_until
from remora.errors import InvalidArgumentError, RemoraError, ResourceExhaustedError
from remora.wire import remora_v1, vaccel
from remora.wire.ttrpc.core import request_frame
from remora.wire.ttrpc.sync import Client

#: What the agent may grow by in these tests: its limits on messages in flight, and some room.
MEMORY_BYTES = 64 << 20
HEADER = struct.Struct(">IIBB")


@pytest.fixture(autouse=True)
def _unharmed(agent: AgentProcess) -> Iterator[None]:
    """After every attack the agent is there, serves, and has not grown beyond its limits."""
    before = agent.memory_bytes()
    pid = agent.pid
    yield
    assert agent.alive()
    assert agent.pid == pid
    with Guest(agent.connect()) as guest:
        guest.infer("identity")
    grown = agent.memory_bytes() - before
    assert grown < MEMORY_BYTES, f"the agent grew by {grown} bytes"


def frame(payload: bytes, stream: int = 1, kind: int = 1, flags: int = 0, length: int | None = None) -> bytes:
    return HEADER.pack(len(payload) if length is None else length, stream, kind, flags) + payload


def closed_by_peer(sock: socket.socket, timeout_s: float = 10.0) -> bool:
    """Read until the agent hangs up; False if it does not."""
    deadline_s = time.monotonic() + timeout_s
    sock.setblocking(False)
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not select.select([sock], [], [], left_s)[0]:
            return False
        try:
            if not sock.recv(65536):
                return True
        except OSError:
            return True
    return False


def send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the agent may hang up in the middle: that is an answer
        sock.sendall(data)


def test_random_bytes_end_only_their_own_connection(agent: AgentProcess) -> None:
    chance = random.Random(7)
    with Guest(agent.connect()) as other:
        for _ in range(200):
            with agent.connect() as sock:
                send_all(sock, chance.randbytes(chance.randrange(1, 2000)))
        assert other.infer("identity")


def test_random_payloads_in_right_frames_are_answered(agent: AgentProcess) -> None:
    chance = random.Random(8)
    methods = [*remora_v1.METHODS, "None"]
    with agent.connect() as sock:
        for number in range(1000):
            service = chance.choice((remora_v1.SERVICE, *vaccel.SERVICES)).encode()
            method = chance.choice(methods).encode()
            payload = chance.randbytes(chance.randrange(0, 100))
            body = b"\x0a" + bytes([len(service)]) + service + b"\x12" + bytes([len(method)]) + method
            body += b"\x1a" + bytes([len(payload)]) + payload
            sock.sendall(frame(body, stream=2 * number + 1))
            head = sock.recv(10, socket.MSG_WAITALL)
            size, stream, kind, _flags = HEADER.unpack(head)
            assert (stream, kind) == (2 * number + 1, 2)
            sock.recv(size, socket.MSG_WAITALL)


@pytest.mark.parametrize("cut", [1, 5, 9, 10, 11, 40])
def test_a_truncated_frame_is_given_up(agent: AgentProcess, cut: int) -> None:
    body = b"".join(
        bytes(piece) for piece in request_frame(1, remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=1))
    )
    with agent.connect() as sock:
        sock.sendall(body[:cut])
        sock.shutdown(socket.SHUT_WR)
        assert closed_by_peer(sock)


def test_a_client_that_stops_in_a_frame_is_closed_after_the_frame_timeout(agent: AgentProcess) -> None:
    with agent.connect() as sock:
        sock.sendall(HEADER.pack(1000, 1, 1, 0) + b"half of it")
        assert closed_by_peer(sock, 10.0)


def test_a_slow_sender_holds_up_nobody_and_is_closed(agent: AgentProcess) -> None:
    with agent.connect() as slow, Guest(agent.connect()) as guest:
        slow.sendall(HEADER.pack(60_000, 1, 1, 0))
        slow.setblocking(False)
        started_s = time.monotonic()
        ended = False
        while not ended and time.monotonic() - started_s < 15:
            guest.ping()
            try:
                slow.send(b"x")
            except OSError:
                ended = True
            select.select([slow], [], [], 0.05)
        assert ended


@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 31, 9_000_000])
def test_a_huge_length_allocates_nothing(agent: AgentProcess, length: int) -> None:
    before = agent.memory_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            sock = stack.enter_context(agent.connect())
            sock.sendall(HEADER.pack(length, 1, 1, 0) + b"x" * 100)
        with Guest(agent.connect()) as guest:
            guest.ping()
        assert agent.memory_bytes() - before < MEMORY_BYTES


def test_many_announced_large_messages_stay_within_the_tenants_bytes_in_flight(agent: AgentProcess) -> None:
    with contextlib.ExitStack() as stack:
        answers = []
        for _ in range(8):  # 8 x 4 MB announced, 16 MiB allowed
            sock = stack.enter_context(agent.connect())
            sock.sendall(HEADER.pack(4_000_000, 1, 1, 0) + b"x" * 100)
            answers.append(sock)
        readable: list[socket.socket] = []
        deadline_s = time.monotonic() + 5
        while len(readable) < 3 and time.monotonic() < deadline_s:
            readable = select.select(answers, [], [], 0.2)[0]
        assert len(readable) >= 3
        assert b"limits.in_flight_bytes_per_tenant" in readable[0].recv(4096)


def test_deep_nesting_is_refused(agent: AgentProcess) -> None:
    payload = b"\x0b" * 100_000  # groups within groups
    with Client(agent.connect()) as client:
        with pytest.raises(RemoraError):
            client.call(remora_v1.SERVICE, "Hello", [payload], remora_v1.HelloResponse)
        nested = b""
        for _ in range(200):
            nested = b"\x0a" + bytes([min(len(nested), 127)]) + nested[:127]
        with pytest.raises(RemoraError):
            client.call(remora_v1.SERVICE, "Models", [nested], remora_v1.ModelsResponse)


def test_a_million_tiny_elements_are_refused(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        for payload in (b"\x12\x00" * 1_000_000, b"\x1a\x00" * 1_000_000):
            with pytest.raises(InvalidArgumentError):
                guest._client.call(remora_v1.SERVICE, "Infer", [payload], remora_v1.InferResponse, timeout_s=20)


def test_wrong_enums_and_numbers_are_refused(agent: AgentProcess) -> None:
    with Client(agent.connect()) as client:
        service = vaccel.SERVICES[0]
        session = client.call(service, "CreateSession", vaccel.SessionCreateRequest(), vaccel.SessionCreateResponse)
        blob = vaccel.ResourceBlob(type_=1, name="m", data=b"x")
        for request in (
            vaccel.ResourceRegisterRequest(session_id=session.session_id, resource_type=99, blobs=[blob]),
            vaccel.ResourceRegisterRequest(
                session_id=session.session_id, blobs=[vaccel.ResourceBlob(type_=77, name="m", data=b"x")]
            ),
            vaccel.ResourceRegisterRequest(session_id=session.session_id, resource_id=-5),
            vaccel.ResourceRegisterRequest(session_id=-1, blobs=[blob]),
            vaccel.ResourceRegisterRequest(session_id=session.session_id, blobs=[blob] * 65),
        ):
            with pytest.raises(RemoraError):
                client.call(service, "RegisterResource", request, vaccel.ResourceRegisterResponse)


@pytest.mark.parametrize(
    "tensor",
    [
        remora_v1.Tensor(name="input", dtype="float32", shape=[1 << 40, 1 << 40], data=b""),
        remora_v1.Tensor(name="input", dtype="float32", shape=[-1], data=b""),
        remora_v1.Tensor(name="input", dtype="object", shape=[1], data=b"1234"),
        remora_v1.Tensor(name="input", dtype="float32", shape=[1] * 5000, data=b"1234"),
        remora_v1.Tensor(name="n" * 100_000, dtype="float32", shape=[1], data=b"1234"),
    ],
)
def test_tensors_that_cannot_be_are_refused_at_the_door(agent: AgentProcess, tensor: remora_v1.Tensor) -> None:
    with Guest(agent.connect()) as guest, pytest.raises(InvalidArgumentError):
        guest.call("Infer", remora_v1.InferRequest(model="identity", inputs=[tensor]), remora_v1.InferResponse)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sha256:../../x", "\0", "x" * 10_000, "sha256:"])
def test_names_that_look_like_paths_open_nothing(agent: AgentProcess, name: str) -> None:
    with Guest(agent.connect()) as guest:
        for method, request in (
            ("LoadModel", remora_v1.LoadModelRequest(model=name)),
            ("StatResource", remora_v1.StatResourceRequest(digest=name)),
            ("PutResource", remora_v1.PutResourceRequest(digest=name, total_bytes=1, data=b"x")),
            ("UnloadModel", remora_v1.UnloadModelRequest(model=name)),
        ):
            with pytest.raises(InvalidArgumentError):
                guest.call(method, request, remora_v1.Empty)


@pytest.mark.parametrize(
    ("offset", "total"), [(0, 0), (5, 1), (1 << 63, 1 << 63), (0, (1 << 64) - 1), ((1 << 64) - 1, 10)]
)
def test_uploads_with_impossible_numbers_are_refused(agent: AgentProcess, offset: int, total: int) -> None:
    request = remora_v1.PutResourceRequest(digest="sha256:" + "1" * 64, offset=offset, total_bytes=total, data=b"xx")
    with Guest(agent.connect()) as guest, pytest.raises(RemoraError):
        guest.call("PutResource", request, remora_v1.PutResourceResponse)


def test_a_client_that_never_reads_is_closed_and_costs_only_itself(agent: AgentProcess) -> None:
    payload = remora_v1.NoopRequest(data=bytes(1 << 20))
    hello = b"".join(
        bytes(piece) for piece in request_frame(1, remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=1))
    )
    with agent.connect() as sock, Guest(agent.connect()) as guest:
        sock.setblocking(False)
        sock.send(hello)
        pending = b""
        stream = 3
        ended = False
        deadline_s = time.monotonic() + 20
        while not ended and time.monotonic() < deadline_s:
            if not pending:
                pieces = request_frame(stream, remora_v1.SERVICE, "Noop", payload)
                pending = b"".join(bytes(piece) for piece in pieces)
                stream += 2
            try:
                pending = pending[sock.send(pending) :]
            except BlockingIOError:
                guest.ping()
                select.select([], [sock], [], 0.05)
            except OSError:
                ended = True
        assert ended
        guest.ping()


def test_a_thousand_idle_connections_are_held_and_one_too_many_is_told_why(agent: AgentProcess) -> None:
    before = agent.memory_bytes()
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(Guest(agent.connect())) for _ in range(1000)]
        per_session = (agent.memory_bytes() - before) / 1000
        assert per_session < 32 << 10, f"{per_session:.0f} bytes for each idle session"
        for guest in guests[::100]:
            guest.ping()
        for _ in range(100):
            stack.enter_context(Guest(agent.connect()))
        with pytest.raises(ResourceExhaustedError, match=r"limits\.sessions_per_tenant"):
            Guest(agent.connect())
    wait_until(lambda: connections(agent) == 0, "all connections are forgotten")


def connections(agent: AgentProcess) -> int:
    from remora.wire import control_v1

    return agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse).connections


def test_connections_that_never_say_hello_are_closed(agent: AgentProcess) -> None:
    with agent.connect() as sock:
        assert closed_by_peer(sock, 15.0)


def test_a_flood_of_requests_from_one_client_leaves_the_others_served(agent: AgentProcess) -> None:
    noop = remora_v1.NoopRequest(data=b"x" * 100)
    with agent.connect() as flood, Guest(agent.connect()) as guest:
        flood.setblocking(False)
        data = b"".join(
            bytes(piece) for piece in request_frame(1, remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=1))
        )
        for number in range(1, 5000):
            pieces = request_frame(2 * number + 1, remora_v1.SERVICE, "Noop", noop)
            data += b"".join(bytes(piece) for piece in pieces)
        slowest_s = 0.0
        while data:
            try:
                data = data[flood.send(data[:65536]) :]
            except BlockingIOError:
                with contextlib.suppress(BlockingIOError):
                    flood.recv(1 << 20)
            started_s = time.monotonic()
            guest.ping()
            slowest_s = max(slowest_s, time.monotonic() - started_s)
        assert slowest_s < 1.0


def test_the_control_socket_survives_nonsense(agent: AgentProcess) -> None:
    chance = random.Random(9)
    for _ in range(50):
        with agent.connect(agent.control) as sock:
            send_all(sock, chance.randbytes(500))
    with Client(agent.connect(agent.control)) as client, pytest.raises(RemoraError):
        client.call("remora.v1.Accelerator", "Hello", remora_v1.HelloRequest(), remora_v1.HelloResponse)


def test_the_metrics_socket_survives_nonsense(agent: AgentProcess) -> None:
    chance = random.Random(10)
    for size in (1, 100, 20_000):
        with agent.connect(agent.metrics) as sock:
            send_all(sock, chance.randbytes(size))
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(agent.connect(agent.metrics))
    wait_until(lambda: healthy(agent), "the health page is served again")


def healthy(agent: AgentProcess) -> bool:
    with agent.connect(agent.metrics) as sock:
        try:
            sock.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            return sock.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


def test_many_hellos_at_once_open_one_session(agent: AgentProcess) -> None:
    from remora.wire import control_v1

    hello = remora_v1.HelloRequest(version=1, client="many")
    before = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse).sessions
    with agent.connect() as sock:
        for number in range(100):
            for piece in request_frame(2 * number + 1, remora_v1.SERVICE, "Hello", hello):
                sock.sendall(piece)
        for _ in range(100):
            size, *_rest = HEADER.unpack(sock.recv(10, socket.MSG_WAITALL))
            sock.recv(size, socket.MSG_WAITALL)
        assert agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse).sessions <= before + 1
