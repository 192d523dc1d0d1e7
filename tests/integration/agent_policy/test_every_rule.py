"""Every key of the policy, at every door: what it refuses, and that the refusal names the rule."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, identity_request, wait_until
from remora.errors import PermissionDeniedError, RemoraError, ResourceExhaustedError
from remora.wire import remora_v1, vaccel
from vaccel_google import GoogleClient

RULES = {
    "operations": '["nothing"]',
    "models": '["other-*"]',
    "devices": '["tpu:*"]',
    "requests_per_s": "0.01",
    "device_s_per_s": "1e-06",
    "queue_length": "1",
    "stored_bytes": "1000",
    "sessions": "1",
    "message_bytes": "4194304",
    "exec": "false",
}
CONFIG = "\n".join(f'[tenant."{key}"]\n{key} = {value}' for key, value in RULES.items()) + "\nconcurrent_requests = 1\n"
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
