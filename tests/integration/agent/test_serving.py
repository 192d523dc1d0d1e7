"""The agent as a whole: native protocol, real workers, and what an operator can see."""

from __future__ import annotations

import hashlib
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from agent_process import AgentProcess, Guest, identity_request, wait_until
from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnimplementedError,
)
from remora.wire import control_v1, remora_v1


def test_hello_opens_a_session_and_says_what_the_agent_offers(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        assert len(guest.token) >= 16
        assert not guest.hello.resumed
        assert set(guest.hello.operations) == {"classify", "depth", "detect", "infer", "pose", "segment"}
        assert guest.hello.max_message_bytes == 8388608
        assert guest.hello.version == 1


def test_a_catalogue_model_runs_without_being_loaded_first(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        answer = guest.infer("identity", 42.5)
    assert struct.unpack("<f", answer.outputs[0].data) == (42.5,)
    assert answer.timing is not None


def test_a_picture_is_classified(agent: AgentProcess) -> None:
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.new("RGB", (320, 240), (200, 120, 30)).save(stream, "JPEG")
    with Guest(agent.connect()) as guest:
        answer = guest.call(
            "Classify",
            remora_v1.ClassifyRequest(model="efficientnet-lite0", image=stream.getvalue(), top=3),
            remora_v1.ClassifyResponse,
        )
    assert len(answer.labels) == 3
    assert answer.labels[0].score >= answer.labels[1].score
    assert all(label.name for label in answer.labels)


def test_a_large_tensor_comes_back_unchanged(agent: AgentProcess) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: goes through shared memory
    tensor = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 8, 256, 256], data=data)
    with Guest(agent.connect()) as guest:
        for _ in range(20):
            answer = guest.call(
                "Infer", remora_v1.InferRequest(model="identity", inputs=[tensor]), remora_v1.InferResponse
            )
            assert bytes(answer.outputs[0].data) == data


def test_many_requests_share_one_connection(agent: AgentProcess) -> None:
    failures: list[object] = []
    with Guest(agent.connect()) as guest:

        def work(value: float) -> None:
            for _ in range(20):
                answer = guest.infer("identity", value)
                if struct.unpack("<f", answer.outputs[0].data) != (value,):
                    failures.append(answer)

        threads = [threading.Thread(target=work, args=(float(number),)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_an_uploaded_model_runs_in_the_tenants_own_worker(agent: AgentProcess, identity_model: bytes) -> None:
    digest = f"sha256:{hashlib.sha256(identity_model).hexdigest()}"
    with Guest(agent.connect()) as guest:
        with pytest.raises(NotFoundError):
            guest.infer(digest)
        assert guest.upload(digest, identity_model).complete
        with pytest.raises(NotFoundError, match="load it first"):
            guest.infer(digest)
        loaded = guest.load(digest)
        assert loaded.model is not None
        assert [spec.dtype for spec in loaded.model.inputs] == ["float32"]
        assert struct.unpack("<f", guest.infer(digest, 7.0).outputs[0].data) == (7.0,)
        names = [model.name for model in guest.call("Models", remora_v1.Empty(), remora_v1.ModelsResponse).models]
        assert digest in names
        status = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
        domains = {worker.domain for worker in status.workers}
        assert {"shared", agent_tenant()} <= domains
        guest.call("UnloadModel", remora_v1.UnloadModelRequest(model=digest), remora_v1.Empty)
        with pytest.raises(NotFoundError):
            guest.infer(digest)


def agent_tenant() -> str:
    import os

    return f"uid:{os.geteuid()}"


def test_a_file_that_is_no_model_is_refused_and_the_agent_goes_on(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        for data in (b"PK\x03\x04" + b"x" * 100, b"no model at all" * 100):
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            guest.upload(digest, data)
            with pytest.raises((InvalidArgumentError, PermissionDeniedError)):
                guest.load(digest)
        guest.ping()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (remora_v1.InferRequest(model="identity"), "no input"),
        (remora_v1.InferRequest(model="", inputs=[remora_v1.Tensor(name="x", dtype="uint8")]), "bytes"),
        (
            remora_v1.InferRequest(
                model="identity", inputs=[remora_v1.Tensor(name="input", dtype="float32", shape=[2], data=b"1234")]
            ),
            "8 bytes, 4 were sent",
        ),
        (
            remora_v1.InferRequest(
                model="identity", inputs=[remora_v1.Tensor(name="nope", dtype="float32", shape=[1], data=b"1234")]
            ),
            "input",
        ),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    agent: AgentProcess, request_: remora_v1.InferRequest, message: str
) -> None:
    with Guest(agent.connect()) as guest, pytest.raises(InvalidArgumentError, match=message):
        guest.call("Infer", request_, remora_v1.InferResponse)


def test_an_unknown_model_is_told_which_there_are(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest, pytest.raises(NotFoundError, match="identity"):
        guest.infer("resnet-9000")


def test_what_is_no_picture_is_refused(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest, pytest.raises(InvalidArgumentError):
        guest.call(
            "Classify",
            remora_v1.ClassifyRequest(model="efficientnet-lite0", image=b"not a picture"),
            remora_v1.ClassifyResponse,
        )


def test_a_request_before_hello_is_refused(agent: AgentProcess) -> None:
    from remora.wire.ttrpc.sync import Client

    with Client(agent.connect()) as client:
        with pytest.raises(FailedPreconditionError, match="Hello first"):
            client.call(remora_v1.SERVICE, "Noop", remora_v1.NoopRequest(), remora_v1.NoopResponse)
        with pytest.raises(InvalidArgumentError, match="version 9"):
            client.call(remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=9), remora_v1.HelloResponse)
        with pytest.raises(UnimplementedError, match="Frobnicate"):
            client.call(remora_v1.SERVICE, "Frobnicate", remora_v1.Empty(), remora_v1.Empty)
        with pytest.raises(UnimplementedError, match=r"no\.such\.Service"):
            client.call("no.such.Service", "Hello", remora_v1.Empty(), remora_v1.Empty)


def test_a_closed_session_is_over(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        guest.call("Close", remora_v1.Empty(), remora_v1.Empty)
        with pytest.raises(FailedPreconditionError, match="ended"):
            guest.ping()
        with Guest(agent.connect(), guest.token) as again:
            assert not again.hello.resumed


def test_a_deadline_that_is_too_short_is_answered_as_such(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        with pytest.raises(DeadlineExceededError):
            guest.call("Infer", identity_request("identity"), remora_v1.InferResponse, timeout_s=0.00001)
        guest.ping()


def test_a_message_beyond_the_limit_is_refused_and_the_connection_goes_on(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        with pytest.raises(ResourceExhaustedError, match="8388608"):
            guest.call("Noop", remora_v1.NoopRequest(data=bytes(9_000_000)), remora_v1.NoopResponse)
        guest.ping()


def test_an_upload_beyond_the_quota_is_refused_by_name(agent: AgentProcess) -> None:
    request = remora_v1.PutResourceRequest(digest="sha256:" + "0" * 64, total_bytes=60_000_000, data=b"x")
    with Guest(agent.connect()) as guest, pytest.raises(ResourceExhaustedError, match=r"store\.tenant_bytes"):
        guest.call("PutResource", request, remora_v1.PutResourceResponse)


def http_get(path: Path, target: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


def test_metrics_and_health_are_served(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        guest.infer("identity")
        with pytest.raises(NotFoundError):
            guest.infer("none")
        text = http_get(agent.metrics, "/metrics").decode()
    assert http_get(agent.metrics, "/healthz").startswith(b"HTTP/1.1 200 ")
    assert http_get(agent.metrics, "/readyz").startswith(b"HTTP/1.1 200 ")
    samples = [
        (sample.name, sample.labels) for family in parse(text.partition("\r\n\r\n")[2]) for sample in family.samples
    ]

    def has(name: str, **labels: str) -> bool:
        return any(found == name and labels.items() <= given.items() for found, given in samples)

    assert has("remora_requests_total", code="OK", door="native", method="Infer")
    assert has("remora_refusals_total", rule="NOT_FOUND")
    assert has("remora_stage_seconds_bucket", le="+Inf", model="identity", operation="infer", stage="run")
    assert has("remora_worker_busy", device="cpu", domain="shared")


def test_a_refused_request_is_a_line_in_the_log(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        with pytest.raises(NotFoundError):
            guest.infer("a-model-for-the-log")

        def lines() -> list[str]:
            return [line for line in agent.log.splitlines() if "a-model-for-the-log" in line and "refused" in line]

        wait_until(lines, "the line is written")
        (line,) = lines()
        for part in (f"tenant={agent_tenant()}", f"session={guest.hello.session_id}", "operation=Infer", "rule="):
            assert part in line


def test_status_is_shown_to_people_and_machines(agent: AgentProcess) -> None:
    import json

    command = [sys.executable, "-m", "remora", "agent", "status", "--control", str(agent.control)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"pid {agent.pid}" in text
    answer = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert answer["pid"] == agent.pid
    assert answer["listeners"] == [agent.address]


def test_status_without_an_agent_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remora", "agent", "status", "--control", str(tmp_path / "none.sock")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 10
    assert result.stderr.count("\n") == 1
    assert "no agent answers" in result.stderr


def test_a_worker_that_is_killed_is_replaced(agent: AgentProcess) -> None:
    import os
    import signal

    with Guest(agent.connect()) as guest:
        guest.infer("identity")
        status = agent.ask("Status", control_v1.Empty(), control_v1.StatusResponse)
        (shared,) = [worker for worker in status.workers if worker.domain == "shared"]
        os.kill(shared.pid, signal.SIGKILL)
        for value in range(5):
            assert struct.unpack("<f", guest.infer("identity", float(value)).outputs[0].data) == (float(value),)
        assert struct.unpack("<f", guest.infer("identity", 9.0).outputs[0].data) == (9.0,)
