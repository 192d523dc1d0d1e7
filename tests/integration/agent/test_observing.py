"""What an operator sees of a real agent: traces at a collector, refusals in the log, and no secret anywhere."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, identity_request, wait_until
from otlp_receiver import Receiver, attributes
from remora.client import session as sessions
from remora.errors import NotFoundError, RemoraError, ResourceExhaustedError, UnimplementedError
from remora.wire import control_v1, health_v1, remora_v1, vaccel
from remora.wire.ttrpc.sync import Client

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
#: Takes a hundredth of a second.
PICTURE = remora_v1.InferRequest(
    model="efficientnet-lite0",
    inputs=[remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=bytes(602112))],
)
CONFIG = "[limits]\nmessage_bytes = 4194304\n"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, models: Path, receiver: Receiver) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path_factory.mktemp("traced"), config=CONFIG, models=models)
    oip = f"oip+unix://{agent.directory}/oip.sock"
    endpoint = ("--trace-endpoint", receiver.endpoint, "--trace-ratio", "0")
    agent.start("--listen", oip, "--log-format", "json", *endpoint)
    yield agent
    assert agent.stop() == 0
    assert "internal error" not in agent.log


def test_a_request_over_each_door_is_traced_below_its_callers_span(traced: AgentProcess, receiver: Receiver) -> None:
    with sessions.connect(traced.address) as session:
        session.infer("identity", {"input": remora_tensor()}, traceparent=TRACEPARENT)
        session.infer("identity", {"input": remora_tensor()})  # nobody follows it
        with pytest.raises(RemoraError):
            session.infer("no-model", {"input": remora_tensor()}, traceparent=TRACEPARENT)
    body = json.dumps(
        {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1, 1, 1], "data": [1.0]}]}
    ).encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{traced.directory}/oip.sock")
        sock.sendall(
            b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"traceparent: {TRACEPARENT}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    wait_until(lambda: len([span for span in receiver.spans if span.kind == 2]) >= 3, "the spans arrive")
    spans = receiver.spans
    doors = [span for span in spans if span.kind == 2]
    assert [span.name for span in doors] == ["native/Infer", "native/Infer", "oip_rest/ModelInfer"]
    assert {span.trace_id.hex() for span in spans} == {TRACEPARENT[3:35]}
    assert {span.parent_span_id.hex() for span in doors} == {TRACEPARENT[36:52]}
    for door in (doors[0], doors[2]):
        stages = [span.name for span in spans if span.parent_span_id == door.span_id]
        assert stages == ["queue", "copy", "run"]
    assert doors[1].status.code == 2
    assert attributes(doors[1])["remora.code"] == "NOT_FOUND"
    assert attributes(doors[0])["remora.model"] == "identity"


def remora_tensor() -> object:
    from remora import Tensor

    return Tensor(bytes(4), "float32", [1, 1, 1, 1])


def test_grpc_metadata_carries_the_context_too(traced: AgentProcess, receiver: Receiver) -> None:
    triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing")
    import numpy as np

    client = triton.InferenceServerClient(f"unix:{traced.directory}/oip.sock")
    given = triton.InferInput("input", [1, 1, 1, 1], "FP32")
    given.set_data_from_numpy(np.zeros((1, 1, 1, 1), np.float32))
    client.infer("identity", [given], headers={"traceparent": TRACEPARENT})
    client.close()
    wait_until(lambda: any(span.name == "oip_grpc/ModelInfer" for span in receiver.spans), "the span arrives")


def test_vaccels_callers_pass_their_current_span_on(
    traced: AgentProcess, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    from remora.vaccel import FFIError, Session, config

    monkeypatch.setenv("VACCEL_RPC_ADDRESS", traced.address)
    context = SpanContext(int(TRACEPARENT[3:35], 16), int(TRACEPARENT[36:52], 16), True, TraceFlags(1))
    try:
        session = Session()
        with trace.use_span(NonRecordingSpan(context)), pytest.raises(FFIError):
            session.classify(b"no picture")
    finally:
        config.cleanup()

    def found() -> list[bytes]:
        return [span.parent_span_id for span in receiver.spans if span.name == "vaccel/ImageClassification"]

    wait_until(found, "the span arrives")
    assert found()[0].hex() == TRACEPARENT[36:52]


def test_a_message_that_is_too_large_is_refused_in_the_log(traced: AgentProcess) -> None:
    with Guest(traced.connect()) as guest, pytest.raises(ResourceExhaustedError):
        guest.call("Noop", remora_v1.NoopRequest(data=bytes(5_000_000)), remora_v1.NoopResponse)

    def lines() -> list[dict[str, object]]:
        entries = [json.loads(line) for line in traced.log.splitlines() if line.startswith("{")]
        return [entry for entry in entries if entry.get("rule") == "limits.message_bytes"]

    wait_until(lines, "the line is written")
    assert lines()[0]["value"] == "4194304"
    assert "message_bytes under [limits]" in str(lines()[0]["change"])


def test_bytes_that_are_no_protocol_are_a_line_too(traced: AgentProcess) -> None:
    with traced.connect() as sock:
        sock.sendall(b"\x00\x00\x00\x00\x00\x00\x00\x01\x07\x00" * 3)  # no such kind of frame
        while sock.recv(1000):
            pass
    wait_until(lambda: '"operation": "message", "model": "", "session": "", "code": "INVALID' in traced.log, "the line")


def test_a_flood_of_refusals_is_counted_whole_and_written_in_part(traced: AgentProcess) -> None:
    with Guest(traced.connect(traced.attach("flood"))) as guest:
        for _ in range(1000):
            with pytest.raises(NotFoundError):
                guest.infer("flooded")
    lines = [line for line in traced.log.splitlines() if "sandbox:flood" in line and "request refused" in line]
    assert 50 <= len(lines) < 200
    metrics = page(traced, "/metrics").decode()
    assert 'remora_refusals_total{tenant="sandbox:flood",rule="NOT_FOUND"} 1000' in metrics
    suppressed = float(metrics.split("\nremora_log_lines_suppressed_total ")[1].split("\n")[0])
    assert suppressed >= 1000 - len(lines)
    traced.detach("flood")


def test_neither_tokens_nor_payloads_are_in_the_log(traced: AgentProcess) -> None:
    marker = b"TOPSECRETPAYLOAD"
    with Guest(traced.connect()) as guest:
        token = guest.token
        tensor = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 1, 1, 7], data=marker)
        with pytest.raises(RemoraError):
            guest.call("Infer", remora_v1.InferRequest(model="identity", inputs=[tensor]), remora_v1.InferResponse)
        with pytest.raises(RemoraError):
            guest.call("Classify", remora_v1.ClassifyRequest(model="none", image=marker), remora_v1.ClassifyResponse)
        with pytest.raises(RemoraError):  # a second Hello on the connection, with a token
            guest.call("Hello", remora_v1.HelloRequest(version=1, token=token), remora_v1.HelloResponse)
        with pytest.raises(RemoraError):
            guest.call("Infer", identity_request("last-line"), remora_v1.InferResponse)
    with Client(traced.connect()) as client, pytest.raises(RemoraError):
        client.call(
            "no.Service", "Method", remora_v1.Empty(), remora_v1.Empty, metadata={"authorization": "Bearer abc"}
        )
    wait_until(lambda: "no.Service" in traced.log, "the lines are written")
    for secret in (marker.decode(), token.hex(), repr(token)[2:-1], base64.b64encode(token).decode(), "Bearer"):
        assert secret not in traced.log


def check(sock: socket.socket, service: str = "") -> int:
    with Client(sock) as client:
        request = health_v1.CheckRequest(service=service)
        return client.call(health_v1.SERVICE, "Check", request, health_v1.CheckResponse, timeout_s=10).status


def test_the_health_service_answers_on_ttrpc_sockets_without_a_session(traced: AgentProcess) -> None:
    for service in ("", remora_v1.SERVICE, *vaccel.SERVICES):
        assert check(traced.connect(), service) == health_v1.SERVING
    assert check(traced.connect(traced.control)) == health_v1.SERVING
    with pytest.raises(NotFoundError):
        check(traced.connect(), "no.Service")
    with Client(traced.connect()) as client, pytest.raises(UnimplementedError):
        client.call(health_v1.SERVICE, "Watch", health_v1.CheckRequest(), health_v1.CheckResponse)


def test_the_health_service_answers_a_stock_grpc_client(traced: AgentProcess) -> None:
    grpc = pytest.importorskip("grpc", reason="grpcio is missing")
    with grpc.insecure_channel(f"unix:{traced.directory}/oip.sock") as channel:
        call = channel.unary_unary(f"/{health_v1.SERVICE}/Check")  # bytes in, bytes out
        assert call(b"", timeout=10) == b"\x08\x01"
        assert call(b"\x0a\x1einference.GRPCInferenceService", timeout=10) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x0a\x04none", timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_draining_agent_is_not_ready_and_says_so(tmp_path: Path, models: Path) -> None:
    agent = AgentProcess(tmp_path, models=models)
    agent.start()
    command = [sys.executable, "-m", "remora", "agent", "status", "--json", "--control", str(agent.control)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(asked.stdout)["health"] == "serving"
        with Guest(agent.connect()) as guest, Client(agent.connect(agent.control)) as control:
            assert page(agent, "/readyz").startswith(b"HTTP/1.1 200 ")
            busy = [
                guest._client.stream(remora_v1.SERVICE, "Infer", PICTURE, remora_v1.InferResponse) for _ in range(50)
            ]
            drain = control.stream(
                control_v1.SERVICE, "Drain", control_v1.DrainRequest(timeout_s=20), control_v1.DrainResponse
            )
            wait_until(lambda: "agent draining" in agent.log, "the drain begins")
            assert page(agent, "/readyz").startswith(b"HTTP/1.1 503 ")
            assert page(agent, "/healthz").startswith(b"HTTP/1.1 200 ")
            assert check(agent.connect(agent.control)) == health_v1.NOT_SERVING
            for stream in busy:
                stream.cancel()
            guest.close()
            drain.receive()
    finally:
        assert agent.stop() == 0


def page(agent: AgentProcess, target: str) -> bytes:
    with agent.connect(agent.metrics) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer
