"""Every vAccel method, opcode and failure, by a client of Google's protobuf and by containerd's Go ttrpc, under both
service names; and our client at containerd's server. The tables must name all that the protocol has.
"""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from agent_process import AgentProcess, catalogue_directory, running_agent
from go_peer import Peer, build, wait_for
from remora.errors import NotFoundError
from remora.wire import vaccel
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client
from remora.wire.vaccel_enums import OpType
from vaccel_calls import FAILURES, OPCODES, SUCCESSES, Caller, Failure, Scene
from vaccel_google import GoogleClient, RemoteError
from vaccel_schema import METHODS, Schema

#: Who calls, and under which name: `google-sync`, ...
CLIENTS = [f"{peer}-{name.split('.')[1]}" for peer in ("google", "go") for name in vaccel.SERVICES]


class GoClient:
    """containerd's Go client as a `vaccel_calls.Caller`."""

    def __init__(self, peer: Peer, service: str) -> None:
        self._peer = peer
        self._service = service

    def call(self, method: str, *, raw: bytes | None = None, **values: Any) -> Any:
        assert raw is None
        return self._send(method, [self.message(METHODS[method][0], **values)])

    def stream(self, messages: list[Any]) -> Any:
        return self._send("GenopStream", messages)

    def message(self, name: str, /, **values: Any) -> Any:
        return self._peer.schema.of(f"vaccel.{name}")(**values)

    def arg(self, data: bytes, kind: int, **values: Any) -> Any:
        return self.message("genop.Arg", buf=data, size=values.pop("size", len(data)), arg_type=kind, **values)

    def _send(self, method: str, messages: list[Any]) -> Any:
        code, text, error, response = self._peer.call(self._service, method, *messages)
        if code:
            raise RemoteError(code, text, error, "")
        return response


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("m"), models=catalogue_directory()) as running:
        yield running


@pytest.fixture(scope="module", params=CLIENTS)
def client(
    request: pytest.FixtureRequest, agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Caller]:
    kind, _, name = request.param.partition("-")
    service = next(one for one in vaccel.SERVICES if one.split(".")[1] == name)
    if kind == "google":
        sock = agent.connect()
        sock.settimeout(30)
        google = GoogleClient(sock, service)
        yield google
        google.close()
        return
    program = request.getfixturevalue("program")
    with Peer(program, "client", agent.socket, tmp_path_factory.mktemp("p")) as peer:
        yield GoClient(peer, service)


@pytest.fixture
def scene(client: Caller) -> Iterator[Scene]:
    made = Scene(client, (catalogue_directory() / "identity" / "model.onnx").read_bytes())
    yield made
    try:
        client.call("DestroySession", session_id=made.session)
    except RemoteError:
        pass  # the test has destroyed it


def test_the_tables_name_every_method_and_every_opcode() -> None:
    assert set(SUCCESSES) == set(METHODS) == set(vaccel.METHODS)
    numbers = {number for number in vars(OpType).values() if isinstance(number, int)}
    assert set(OPCODES) >= numbers == set(range(24))
    # GetProfiler answers unknown sessions without a profiler, and CreateSession cannot be wrong.
    assert {failure.method for failure in FAILURES} == set(METHODS) - {"CreateSession", "GetProfiler"}


@pytest.mark.parametrize("method", SUCCESSES)
def test_every_method_does_what_it_says(scene: Scene, method: str) -> None:
    SUCCESSES[method](scene)


@pytest.mark.parametrize("opcode", OPCODES)
def test_every_opcode_writes_or_fails_as_documented(scene: Scene, opcode: int) -> None:
    expected = OPCODES[opcode]
    read, write = expected.arguments(scene.caller)
    if isinstance(expected.outcome, int):
        with pytest.raises(RemoteError) as caught:
            scene.genop(opcode, read, write)
        assert caught.value.errno == expected.outcome
        assert caught.value.code in (7, 13)
        return
    written = scene.genop(opcode, read, write)
    if callable(expected.outcome):
        expected.outcome(written)
    else:
        assert written == expected.outcome


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_every_failure_has_its_status(scene: Scene, failure: Failure) -> None:
    values = failure.values(scene)
    caller, streamed = scene.caller, failure.method == "GenopStream"
    with pytest.raises(RemoteError) as caught:
        caller.stream([caller.message("genop.Request", **values)]) if streamed else caller.call(
            failure.method, **values
        )
    error = caught.value
    assert error.code == failure.code, error
    assert error.errno == failure.errno, error
    assert (error.error.type if error.error is not None else None) == failure.kind, error


@pytest.mark.parametrize("service", vaccel.SERVICES)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_cost_only_their_call(agent: AgentProcess, service: str, method: str) -> None:
    with agent.connect() as sock:
        sock.settimeout(30)
        google = GoogleClient(sock, service)
        session = google.call("CreateSession").session_id
        with pytest.raises(RemoteError) as caught:
            google.call(method, raw=b"\x0a\xff\xff")
        assert caught.value.code in (2, 13)
        google.call("UpdateSession", session_id=session)


# -- the other direction ----------------------------------------------------------------------------------------------


def filled(schema: Schema, name: str, depth: int = 3) -> Any:
    """Return a message with something in every field."""
    message = schema.of(name)()
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            if depth:
                inner = filled(schema, field.message_type.full_name, depth - 1)
                target = getattr(message, field.name)
                target.append(inner) if hasattr(target, "append") else target.CopyFrom(inner)
            continue
        value: Any = {9: "text", 12: b"bytes"}.get(field.type, field.number + 1)
        if hasattr(getattr(message, field.name), "append"):
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)
    return message


@pytest.mark.parametrize("service", vaccel.SERVICES)
def test_our_client_runs_every_method_of_containerds_server(program: Path, service: str, tmp_path: Path) -> None:
    """All fields of all messages, there and back; and an error status for each method."""
    schema = Schema()
    socket = tmp_path / "go.sock"
    failing = "vaccel.failing.AgentService"
    methods = []
    for method, (_request, answer) in METHODS.items():
        common = {"method": method, "stream": method == "GenopStream", **Peer.types(method)}
        value = json_format.MessageToDict(filled(schema, f"vaccel.{answer}"))
        methods.append({"service": service, "answer": value, **common})
        methods.append({"service": failing, "answer": {}, "code": 5, "message": f"no {method}", **common})
    with Peer(program, "server", socket, tmp_path) as peer:
        peer.tell(methods)
        wait_for(socket)
        with connected(socket) as client:
            for method, (request_name, answer_name) in METHODS.items():
                request_cls, answer_cls = vaccel.METHODS[method]
                wanted = filled(schema, f"vaccel.{request_name}")
                request = request_cls.decode(wanted.SerializeToString())
                got = invoke(client, service, method, request, answer_cls)
                heard = peer.hear()
                assert heard == {
                    "method": method,
                    "bytes": wanted.ByteSize(),
                    "request": json_format.MessageToDict(wanted),
                }
                expected = filled(schema, f"vaccel.{answer_name}")
                assert schema.of(f"vaccel.{answer_name}").FromString(got.to_bytes()) == expected
                with pytest.raises(NotFoundError, match=f"no {method}"):
                    invoke(client, failing, method, request, answer_cls)
                peer.hear()


def connected(path: Path) -> Client:
    sock = sockets.socket(sockets.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    return Client(sock)


def invoke(client: Client, service: str, method: str, request: Message, answer: type[Message]) -> Message:
    if method != "GenopStream":
        return client.call(service, method, request, answer, timeout_s=30)
    stream = client.stream(service, method, None, answer, client_streaming=True)
    stream.send(request)
    stream.close_send()
    got = stream.receive()
    assert got is not None
    return got
