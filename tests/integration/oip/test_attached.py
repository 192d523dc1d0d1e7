"""The Open Inference Protocol for attached sandboxes, and what it says of an agent that ends or is too busy."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from oip_clients import Grpc, connected, rest
from remora.agent.doors import oip_messages as messages
from remora.agent.hints import retry_after_s
from remora.errors import from_code
from remora.wire import control_v1
from remora.wire.ttrpc.messages import Status

NUMBER = {"name": "input", "shape": [1, 1, 1, 1], "datatype": "FP32", "data": [1.5]}
RATE = "[defaults]\nmodels = ['*']\n[tenant.\"sandbox:busy\"]\nrequests_per_s = 0.01\n"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path, config=RATE, models=catalogue_directory())
    agent.start("--listen", "oip+attached")
    yield agent
    assert agent.stop() == 0, agent.log[-2000:]
    assert "internal error" not in agent.log


def attach(agent: AgentProcess, name: str) -> Path:
    return agent.attach(name).with_name("channel.sock_8000")


def infer(path: Path, model: str = "identity") -> Any:
    return rest(path, "POST", f"/v2/models/{model}/infer", {"inputs": [NUMBER]})


def number() -> messages.ModelInferRequest:
    return messages.ModelInferRequest(
        model_name="identity",
        inputs=[messages.InferInputTensor(name="input", datatype="FP32", shape=[1, 1, 1, 1])],
        raw_input_contents=[struct.pack("<f", 1.5)],
    )


def test_a_sandbox_is_served_by_its_identity_until_it_is_detached(agent: AgentProcess) -> None:
    assert "oip+attached" in agent.listening
    model = (catalogue_directory() / "identity" / "model.onnx").read_bytes()
    digest = f"sha256:{hashlib.sha256(model).hexdigest()}"
    alice, bob = attach(agent, "alice"), attach(agent, "bob")
    assert alice.stat().st_mode & 0o777 == 0o600
    with Guest(agent.connect(alice.with_name("channel.sock_2048"))) as guest:
        guest.upload(digest, model)
    assert infer(alice, digest).json["outputs"][0]["data"] == [1.5]
    assert infer(bob, digest).status == 404
    assert infer(bob).status == 200
    listed = agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse).attachments
    assert {one.sandbox: (one.sessions, one.requests) for one in listed} == {"alice": (2, 3), "bob": (1, 2)}
    with Grpc(alice) as open_one:
        agent.detach("alice")
        with pytest.raises((AssertionError, OSError)):
            open_one.call("ServerLive")
    assert not alice.exists()
    assert infer(bob).status == 200


def test_the_next_agent_serves_the_sandboxes_of_the_last_one(agent: AgentProcess) -> None:
    path = attach(agent, "kept")
    agent.kill()
    agent.start("--listen", "oip+attached")
    assert infer(path).status == 200


def test_a_refusal_says_when_to_come_back(agent: AgentProcess) -> None:
    path = attach(agent, "busy")
    assert infer(path).status == 200
    refused = infer(path)
    assert refused.status == 429
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    with Grpc(path) as client:
        reply = client.call("ModelInfer", number().to_bytes())
    assert reply.status == 8
    assert 90_000 <= int(reply.headers["grpc-retry-pushback-ms"]) <= 100_000
    details = Status.decode(base64.b64decode(reply.headers["grpc-status-details-bin"] + "=="))
    error = from_code(details.code, details.message)
    error.details = tuple(details.details)
    assert 90 <= (retry_after_s(error) or 0) <= 100
    assert "retry-after" not in infer(path, "no-such-model").headers


def test_an_agent_that_drains_is_live_and_not_ready_and_sends_what_it_has(agent: AgentProcess) -> None:
    path = attach(agent, "late")
    shape = [1, 1, 1000, 1000]
    tensor = {"name": "input", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": 4_000_000}}
    document = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = (
        f"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(document) + 4_000_000}\r\n"
        f"Inference-Header-Content-Length: {len(document)}\r\nConnection: close\r\n\r\n"
    )
    with connected(path) as slow, Grpc(path) as client:
        assert messages.ServerReadyResponse.decode(client.call("ServerReady").body).ready
        slow.sendall(head.encode() + document + bytes(4_000_000))
        got = slow.recv(100)  # an answer is on its way, more than the kernel takes
        drain = threading.Thread(
            target=agent.ask, args=("Drain", control_v1.DrainRequest(timeout_s=20), control_v1.DrainResponse)
        )
        drain.start()
        wait_until(lambda: "agent draining" in agent.log, "the drain begins")
        assert not messages.ServerReadyResponse.decode(client.call("ServerReady").body).ready
        assert messages.ServerLiveResponse.decode(client.call("ServerLive").body).live
        ready = rest(path, "GET", "/v2/health/ready")
        assert (ready.status, ready.json["ready"], ready.headers["retry-after"]) == (503, False, "1")
        refused = client.call("ModelInfer", number().to_bytes())
        assert (refused.status, refused.headers["grpc-retry-pushback-ms"]) == (14, "1000")
        while piece := slow.recv(1 << 20):
            got += piece
        assert got.startswith(b"HTTP/1.1 200")
        assert got.endswith(bytes(4_000_000))
        drain.join(20)
    wait_until(lambda: not agent.alive(), "the agent ends")
