"""Every key of the policy, at every door: what it refuses, and that the refusal names the rule."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, identity_request, wait_until
from c_library import compile_library
from oip_clients import Grpc, Reply
from remora.agent.doors import oip_messages
from remora.errors import PermissionDeniedError, RemoraError, ResourceExhaustedError
from remora.wire import control_v1, remora_v1, vaccel
from remora.wire.vaccel_enums import OpType
from vaccel_calls import BUFFER_BLOB, INT64, RAW, STRING, UINT8
from vaccel_google import GoogleClient, RemoteError

#: Digest of no library.
ALLOWED = "sha256:" + 64 * "0"
RULES = {
    "operations": '["nothing"]',
    "models": '["other-*"]',
    "devices": '["tpu:*"]',
    "requests_per_s": "0.01",
    "device_s_per_s": "1e-06",
    "queue_length": "1",
    "stored_bytes": "1000",
    "connections": "1",
    "sessions": "1",
    "message_bytes": "4194304",
    "exec": "false",
    "libraries": f'["{ALLOWED}"]',
    "concurrent_requests": "1",
}
#: What a rule needs beside it, to be the one that refuses.
BESIDE = {"queue_length": "concurrent_requests = 1", "libraries": "exec = true"}
CONFIG = "\n".join(f'[tenant."{key}"]\n{key} = {value}\n{BESIDE.get(key, "")}' for key, value in RULES.items())
PICTURE = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=bytes(602112))
LARGE = (4 << 20) + 1


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    running = AgentProcess(tmp_path_factory.mktemp("r"), config=CONFIG, models=catalogue_directory())
    running.start("--listen", "oip+attached")
    for key in RULES:
        running.attach(key, tenant=key)
    yield running
    assert running.stop() == 0, running.log[-3000:]
    assert "internal error" not in running.log, running.log[-3000:]


def named(key: str) -> str:
    """Return how a refusal names a rule."""
    return f'rule [tenant."{key}"] {key} = {RULES[key]} in agent.toml'


def guest(agent: AgentProcess, key: str) -> Guest:
    return Guest(agent.connect(agent.directory / f"sandbox-{key}" / "channel.sock_2048"))


def told(agent: AgentProcess, key: str) -> None:
    """The operator finds the rule in the log, too."""
    wait_until(lambda: f'[tenant."{key}"] {key}' in agent.log.replace('\\"', '"'), "the rule in the log")


def thrice(ask: Callable[[], object]) -> None:
    for _ in range(3):
        ask()


# -- the native door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["operations", "models", "devices"])
def test_what_no_pattern_allows_is_refused(agent: AgentProcess, key: str) -> None:
    with guest(agent, key) as caller, pytest.raises(PermissionDeniedError) as refusal:
        caller.infer("identity")
    assert named(key) in refusal.value.message
    told(agent, key)


@pytest.mark.parametrize("key", ["requests_per_s", "device_s_per_s"])
def test_over_a_rate_a_tenant_is_refused_with_a_hint(agent: AgentProcess, key: str) -> None:
    with guest(agent, key) as caller, pytest.raises(ResourceExhaustedError) as refusal:
        thrice(lambda: caller.infer("identity"))
    assert named(key) in refusal.value.message
    assert "try again in" in refusal.value.message


def test_a_full_queue_is_refused(agent: AgentProcess) -> None:
    errors: list[RemoraError] = []
    answered: list[bool] = []
    request = remora_v1.InferRequest(model="efficientnet-lite0", inputs=[PICTURE])
    with guest(agent, "queue_length") as caller:

        def work() -> None:
            try:
                caller.call("Infer", request, remora_v1.InferResponse)
                answered.append(True)
            except RemoraError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answered
    assert errors
    assert all(named("queue_length") in error.message for error in errors), errors


def test_what_is_stored_is_bounded_from_the_first_chunk(agent: AgentProcess) -> None:
    data = os.urandom(2000)
    with guest(agent, "stored_bytes") as caller, pytest.raises(ResourceExhaustedError) as refusal:
        caller.upload("sha256:" + hashlib.sha256(data).hexdigest(), data)
    assert named("stored_bytes") in refusal.value.message


def test_one_session_too_many_is_refused(agent: AgentProcess) -> None:
    with guest(agent, "sessions"), pytest.raises(ResourceExhaustedError) as refusal:
        guest(agent, "sessions")
    assert named("sessions") in refusal.value.message


def test_one_connection_too_many_is_refused(agent: AgentProcess) -> None:
    with guest(agent, "connections"), pytest.raises(ResourceExhaustedError) as refusal:
        guest(agent, "connections")
    assert named("connections") in refusal.value.message


def test_a_message_that_is_too_large_is_refused(agent: AgentProcess) -> None:
    with guest(agent, "message_bytes") as caller:
        assert caller.hello.max_message_bytes == 4 << 20
        request = identity_request("identity")
        request.inputs[0].data = bytes(LARGE)
        with pytest.raises(ResourceExhaustedError) as refusal:
            caller.call("Infer", request, remora_v1.InferResponse)
        assert named("message_bytes") in refusal.value.message
        caller.ping()
    told(agent, "message_bytes")


def test_lists_leave_out_what_may_not_be_used(agent: AgentProcess) -> None:
    with guest(agent, "models") as caller:
        assert caller.call("Models", remora_v1.Empty(), remora_v1.ModelsResponse).models == []
        assert {"classify", "infer"} <= set(caller.hello.operations)
    with guest(agent, "operations") as caller:
        assert list(caller.hello.operations) == []


# -- the Open Inference Protocol --------------------------------------------------------------------------------------


def http(agent: AgentProcess, key: str, method: str, path: str, body: bytes) -> tuple[int, str]:
    with agent.connect(agent.directory / f"sandbox-{key}" / "channel.sock_8000") as sock:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        try:
            sock.sendall(head.encode() + body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was read
        answer = b""
        while part := sock.recv(65536):
            answer += part
    text = answer.partition(b"\r\n\r\n")[2].decode()
    return int(answer.split(b" ")[1]), text


def infer_over_http(agent: AgentProcess, key: str, size: int = 1) -> tuple[int, str]:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1, 1, size], "data": [7.0] * size}
    return http(agent, key, "POST", "/v2/models/identity/infer", json.dumps({"inputs": [tensor]}).encode())


@pytest.mark.parametrize("key", ["operations", "models", "devices"])
def test_over_http_what_no_pattern_allows_is_refused(agent: AgentProcess, key: str) -> None:
    status, text = infer_over_http(agent, key)
    assert status == 403
    assert named(key) in json.loads(text)["error"]


@pytest.mark.parametrize("key", ["requests_per_s", "device_s_per_s"])
def test_over_http_a_rate_is_the_same_bucket(agent: AgentProcess, key: str) -> None:
    answers = [infer_over_http(agent, key) for _ in range(3)]
    status, text = answers[-1]
    assert status == 429
    assert named(key) in json.loads(text)["error"]


def test_over_http_a_body_that_is_too_large_is_refused(agent: AgentProcess) -> None:
    status, text = http(agent, "message_bytes", "POST", "/v2/models/identity/infer", bytes(LARGE))
    assert status == 413
    assert named("message_bytes") in json.loads(text)["error"]


def test_over_http_the_index_leaves_out_what_may_not_be_used(agent: AgentProcess) -> None:
    assert json.loads(http(agent, "models", "POST", "/v2/repository/index", b"{}")[1]) == []
    listed = json.loads(http(agent, "stored_bytes", "POST", "/v2/repository/index", b"{}")[1])
    assert "identity" in [entry["name"] for entry in listed]


# -- vAccel -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vaccel_client(agent: AgentProcess) -> Iterator[Callable[[str], GoogleClient]]:
    made: list[GoogleClient] = []

    def connect(key: str) -> GoogleClient:
        sock: socket.socket = agent.connect(Path(agent.directory / f"sandbox-{key}" / "channel.sock_2048"))
        made.append(GoogleClient(sock, vaccel.SYNC_SERVICE))
        return made[-1]

    yield connect
    for client in made:
        client.close()


@pytest.mark.parametrize("key", ["operations", "models", "requests_per_s", "device_s_per_s"])
def test_a_vaccel_guest_is_refused_by_the_same_rules(
    agent: AgentProcess, vaccel_client: Callable[[str], GoogleClient], key: str
) -> None:
    client = vaccel_client(key)
    session = client.call("CreateSession", flags=1).session_id
    with pytest.raises(Exception, match=key):
        thrice(lambda: client.call("ImageClassification", session_id=session, image=b"no picture"))
    told(agent, key)


def test_a_vaccel_guest_may_have_no_more_sessions(
    agent: AgentProcess, vaccel_client: Callable[[str], GoogleClient]
) -> None:
    client = vaccel_client("sessions")
    with guest(agent, "sessions"), pytest.raises(Exception, match="sessions"):
        client.call("CreateSession", flags=1)


LIBRARY = "F(twice) { int32_t n; memcpy(&n, r[0].buf, 4); n *= 2; memcpy(w[0].buf, &n, 4); return 0; }"


@pytest.mark.parametrize(("key", "says"), [("exec", "exec is off"), ("libraries", "is not allowed")])
def test_a_library_that_may_not_be_run_is_refused_by_name_and_no_process_starts_for_it(
    agent: AgentProcess, vaccel_client: Callable[[str], GoogleClient], tmp_path: Path, key: str, says: str
) -> None:
    client = vaccel_client(key)
    session = client.call("CreateSession", flags=1).session_id
    data = compile_library(tmp_path, "twice", LIBRARY).data
    blob = client.message("resource.Blob", type_=BUFFER_BLOB, name="l", data=data, size=len(data))
    library = client.call("RegisterResource", session_id=session, blobs=[blob]).resource_id
    read = [
        client.arg(bytes([OpType.EXEC_WITH_RESOURCE]), UINT8),
        client.arg(struct.pack("<q", library), INT64),
        client.arg(b"twice\0", STRING),
        client.arg(struct.pack("<i", 21), RAW),
    ]
    with pytest.raises(RemoteError) as refusal:
        client.call("Genop", session_id=session, read_args=read, write_args=[client.arg(bytes(4), RAW)])
    assert says in refusal.value.message
    assert named(key) in refusal.value.message
    told(agent, key)
    status = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
    assert not [worker.domain for worker in status.workers if worker.domain.startswith(key)]


# -- at once ----------------------------------------------------------------------------------------------------------


def most_at_once(agent: AgentProcess, key: str) -> int:
    """Send 24 requests at once as a tenant; return how many of them a worker had in hand at most."""
    request = remora_v1.InferRequest(model="efficientnet-lite0", inputs=[PICTURE])
    most, answered = 0, []
    with guest(agent, key) as caller:
        caller.call("Infer", request, remora_v1.InferResponse)

        def work() -> None:
            answered.append(caller.call("Infer", request, remora_v1.InferResponse))

        threads = [threading.Thread(target=work) for _ in range(24)]
        for thread in threads:
            thread.start()
        while len(answered) < len(threads):
            status = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
            most = max([most, *(worker.jobs for worker in status.workers)])
            if not any(thread.is_alive() for thread in threads):
                break
        for thread in threads:
            thread.join(30)
    assert len(answered) == len(threads)  # more than run at once wait, and are not refused
    return most


def test_of_a_tenants_requests_no_more_run_at_once_than_it_may(agent: AgentProcess) -> None:
    assert most_at_once(agent, "concurrent_requests") == 1
    assert most_at_once(agent, "message_bytes") > 1, "without the rule more do"


# -- the Open Inference Protocol over gRPC ----------------------------------------------------------------------------

PERMISSION_DENIED, RESOURCE_EXHAUSTED = 7, 8


@pytest.fixture
def grpc(agent: AgentProcess) -> Iterator[Callable[[str], Grpc]]:
    with ExitStack() as stack:
        yield lambda key: stack.enter_context(Grpc(agent.directory / f"sandbox-{key}" / "channel.sock_8000"))


def infer_message(size: int = 1) -> bytes:
    tensor = oip_messages.InferInputTensor(name="input", datatype="FP32", shape=[1, 1, 1, size])
    request = oip_messages.ModelInferRequest(
        model_name="identity", inputs=[tensor], raw_input_contents=[bytes(4 * size)]
    )
    return request.to_bytes()


def said(reply: Reply) -> str:
    return unquote(reply.headers["grpc-message"])


@pytest.mark.parametrize("key", ["operations", "models", "devices"])
def test_over_grpc_what_no_pattern_allows_is_refused(
    agent: AgentProcess, grpc: Callable[[str], Grpc], key: str
) -> None:
    reply = grpc(key).call("ModelInfer", infer_message())
    assert reply.status == PERMISSION_DENIED
    assert named(key) in said(reply)
    told(agent, key)


@pytest.mark.parametrize("key", ["requests_per_s", "device_s_per_s"])
def test_over_grpc_a_rate_is_the_same_bucket_and_says_when_to_come_back(grpc: Callable[[str], Grpc], key: str) -> None:
    client = grpc(key)
    reply = [client.call("ModelInfer", infer_message()) for _ in range(3)][-1]
    assert reply.status == RESOURCE_EXHAUSTED
    assert named(key) in said(reply)
    assert int(reply.headers["grpc-retry-pushback-ms"]) > 0


def test_over_grpc_a_message_that_is_too_large_is_refused(grpc: Callable[[str], Grpc]) -> None:
    client = grpc("message_bytes")
    reply = client.call("ModelInfer", infer_message(LARGE // 4))
    assert reply.status == RESOURCE_EXHAUSTED
    assert named("message_bytes") in said(reply)


def test_over_grpc_one_session_too_many_is_refused(agent: AgentProcess, grpc: Callable[[str], Grpc]) -> None:
    with guest(agent, "sessions"):
        reply = grpc("sessions").call("ModelInfer", infer_message())
    assert reply.status == RESOURCE_EXHAUSTED
    assert named("sessions") in said(reply)


def test_over_grpc_the_index_leaves_out_what_may_not_be_used(grpc: Callable[[str], Grpc]) -> None:
    def listed(key: str) -> list[str]:
        reply = grpc(key).call("RepositoryIndex")
        assert reply.status == 0
        return [model.name for model in oip_messages.RepositoryIndexResponse.decode(reply.body).models]

    assert listed("models") == []
    assert "identity" in listed("stored_bytes")
