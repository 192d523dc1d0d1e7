"""Two sandboxes on one agent, and every way to name what one of them has from the other's sockets.

A `Probe` sends one request with a name in it and returns the answer's bytes, in which the name stands as `NAME`: what
belongs to another tenant must get the answer that something made up gets, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_process import AgentProcess, Guest
from oip_clients import Grpc, rest
from remora.agent.doors import oip_messages
from remora.wire import control_v1, remora_v1, vaccel
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client

_HEADER = struct.Struct(">IIBB")


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class RawTtrpc:
    """A ttrpc connection that shows the bytes of answers."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(30)
        self._sock.connect(str(path))
        self._stream = -1

    def call(self, service: str, method: str, message: Message) -> bytes:
        """Return the answer's body: status and payload."""
        from remora.wire.ttrpc.core import request_frame

        self._stream += 2
        self._sock.sendall(b"".join(request_frame(self._stream, service, method, message)))
        size, stream, _kind, _flags = _HEADER.unpack(self._exactly(_HEADER.size))
        assert stream == self._stream
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            assert piece, "the agent has closed the connection"
            data += piece
        return data

    def close(self) -> None:
        self._sock.close()


class Pair:
    """Alice owns things; Bob, on sockets of his own, tries their names. `oip` is whether the agent serves that."""

    def __init__(self, agent: AgentProcess, model: bytes, marker: str) -> None:
        self.agent = agent
        self.names = (f"alice-{marker}", f"bob-{marker}")
        alice, self.bob_path = (agent.attach(name) for name in self.names)
        self.bob_oip = self.bob_path.with_name("channel.sock_8000")
        self.alice = Guest(agent.connect(alice))
        self.alice_vaccel = Client(agent.connect(alice))
        self.model = digest_of(model)
        self.alice.upload(self.model, model)
        self.alice.load(self.model)
        self.alice.infer("identity", 1.0, request_id=77)
        self.session = self._ask("CreateSession", vaccel.SessionCreateRequest()).session_id
        blob = vaccel.ResourceBlob(type_=vaccel.BlobType.BUFFER, name="m", data=model)
        request = vaccel.ResourceRegisterRequest(session_id=self.session, resource_type=2, blobs=[blob])
        self.resource = self._ask("RegisterResource", request).resource_id
        self.native = Guest(agent.connect(self.bob_path))
        self.raw = RawTtrpc(self.bob_path)
        self.raw.call(remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=1))
        self.bob_session = vaccel.SessionCreateResponse.decode(
            _payload(self.raw.call(vaccel.SERVICES[0], "CreateSession", vaccel.SessionCreateRequest()))
        ).session_id
        self.grpc = Grpc(self.bob_oip)

    def _ask(self, method: str, request: Message) -> Any:
        return self.alice_vaccel.call(vaccel.SERVICES[0], method, request, vaccel.METHODS[method][1], timeout_s=30)

    def close(self) -> None:
        for one in (self.alice, self.alice_vaccel, self.native, self.raw, self.grpc):
            one.close()
        for name in self.names:
            self.agent.detach(name)


def _payload(body: bytes) -> bytes:
    from remora.wire.ttrpc.core import response_payload

    return bytes(response_payload(body))


@dataclass(frozen=True)
class Probe:
    """One way to name something. `kind` says of what: `digest`, `session`, `resource`, `token`."""

    door: str
    what: str
    kind: str
    send: Callable[[Pair, Any], bytes]

    def __str__(self) -> str:
        return f"{self.door}-{self.what}"


def other(kind: str, name: Any) -> Any:
    """Return a name of the same length that nobody has."""
    if kind in ("session", "resource"):
        return name ^ 0b101
    if kind == "token":
        return bytes([name[0] ^ 1]) + name[1:]
    return name[:-8] + "".join("0123456789abcdef"[int(digit, 16) ^ 1] for digit in name[-8:])


def _native(method: str, request: Callable[[Any], Message]) -> Callable[[Pair, Any], bytes]:
    return lambda pair, name: pair.raw.call(remora_v1.SERVICE, method, request(name))


def _vaccel(service: str, method: str, request: Callable[[Pair, Any], Message]) -> Callable[[Pair, Any], bytes]:
    return lambda pair, name: pair.raw.call(service, method, request(pair, name))


def _rest(verb: str, target: str, document: Any = None) -> Callable[[Pair, Any], bytes]:
    def send(pair: Pair, name: Any) -> bytes:
        reply = rest(pair.bob_oip, verb, target.format(name), document)
        return json.dumps([reply.status, sorted(reply.headers.items()), reply.body.decode()]).encode()

    return send


def _grpc(method: str, request: Callable[[Any], Message]) -> Callable[[Pair, Any], bytes]:
    def send(pair: Pair, name: Any) -> bytes:
        reply = pair.grpc.call(method, request(name).to_bytes())
        return json.dumps([reply.status, sorted(reply.headers.items()), reply.body.hex()]).encode()

    return send


def _hello(pair: Pair, token: Any) -> bytes:
    """Open a session with a token; what differs between any two sessions is left out."""
    raw = RawTtrpc(pair.bob_path)
    try:
        body = raw.call(remora_v1.SERVICE, "Hello", remora_v1.HelloRequest(version=1, token=token))
    finally:
        raw.close()
    hello = remora_v1.HelloResponse.decode(_payload(body))
    assert len(hello.session_id) == 32
    assert len(hello.token) == 32
    hello.session_id, hello.token = "", b""
    return hello.to_bytes()


def _share(pair: Pair, token: Any) -> bytes:
    """Ask for the memory of a session, on a connection without one."""
    raw = RawTtrpc(pair.bob_path)
    try:
        return raw.call(remora_v1.SERVICE, "Share", remora_v1.ShareRequest(token=token, size_bytes=1 << 20))
    finally:
        raw.close()


def _upload_end(pair: Pair, digest: Any) -> bytes:
    """Claim to have sent all but the last byte."""
    request = remora_v1.PutResourceRequest(digest=digest, offset=99, total_bytes=100, data=b"x")
    return pair.raw.call(remora_v1.SERVICE, "PutResource", request)


NUMBER = {"name": "input", "shape": [1, 1, 1, 1], "datatype": "FP32", "data": [1.5]}
_TENSOR = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 1, 1, 1], data=bytes(4))


def _model_request(name: str) -> Message:
    return oip_messages.ModelRequest(name=name)


def _infer_request(name: str) -> Message:
    tensor = oip_messages.InferInputTensor(name="input", datatype="FP32", shape=[1, 1, 1, 1])
    return oip_messages.ModelInferRequest(model_name=name, inputs=[tensor], raw_input_contents=[bytes(4)])


def _of_vaccel(service: str) -> list[Probe]:
    door = service.split(".")[1] if service.count(".") > 2 else service
    probes = [
        ("UpdateSession", "session", lambda _p, n: vaccel.SessionUpdateRequest(session_id=n)),
        ("DestroySession", "session", lambda _p, n: vaccel.SessionDestroyRequest(session_id=n)),
        ("GetProfiler", "session", lambda _p, n: vaccel.ProfilingRequest(session_id=n)),
        ("ImageClassification", "session", lambda _p, n: vaccel.ImageRequest(session_id=n, image=b"x")),
        ("Genop", "session", lambda _p, n: vaccel.GenopRequest(session_id=n)),
        ("SyncResource", "resource", lambda _p, n: vaccel.ResourceSyncRequest(resource_id=n)),
        (
            "RegisterResource",
            "resource",
            lambda p, n: vaccel.ResourceRegisterRequest(session_id=p.bob_session, resource_id=n),
        ),
        (
            "UnregisterResource",
            "resource",
            lambda p, n: vaccel.ResourceUnregisterRequest(session_id=p.bob_session, resource_id=n),
        ),
        *(
            (method, "resource", lambda p, n, cls=vaccel.METHODS[method][0]: cls(session_id=p.bob_session, model_id=n))
            for method in vaccel.METHODS
            if method.endswith(("ModelLoad", "ModelUnload"))
        ),
        *(
            (method, "session", lambda _p, n, cls=vaccel.METHODS[method][0]: cls(session_id=n, model_id=5))
            for method in vaccel.METHODS
            if method.endswith(("ModelLoad", "ModelUnload"))
        ),
        *(
            (method, "resource", lambda p, n, method=method: _run_request(method, p.bob_session, n))
            for method in vaccel.METHODS
            if method.endswith("ModelRun")
        ),
    ]
    return [Probe(door, method, kind, _vaccel(service, method, request)) for method, kind, request in probes]


def _run_request(method: str, session: int, model: int) -> Message:
    values: dict[str, int] = {"session_id": session, "model_id": model}
    if "nr_out_tensors" in vaccel.METHODS[method][0]._fields:
        values["nr_out_tensors"] = 1
    return vaccel.METHODS[method][0](**values)


PROBES: tuple[Probe, ...] = (
    Probe("native", "Hello", "token", _hello),
    Probe("native", "Share", "token", _share),
    Probe(
        "native", "StatResource", "digest", _native("StatResource", lambda n: remora_v1.StatResourceRequest(digest=n))
    ),
    Probe("native", "PutResource", "digest", _upload_end),
    Probe("native", "LoadModel", "digest", _native("LoadModel", lambda n: remora_v1.LoadModelRequest(model=n))),
    Probe("native", "UnloadModel", "digest", _native("UnloadModel", lambda n: remora_v1.UnloadModelRequest(model=n))),
    Probe("native", "Infer", "digest", _native("Infer", lambda n: remora_v1.InferRequest(model=n, inputs=[_TENSOR]))),
    Probe(
        "native",
        "Infer-again",
        "digest",
        _native("Infer", lambda n: remora_v1.InferRequest(model=n, inputs=[_TENSOR], request_id=77)),
    ),
    Probe(
        "native", "Classify", "digest", _native("Classify", lambda n: remora_v1.ClassifyRequest(model=n, image=b"x"))
    ),
    *(
        Probe("native", method, "digest", _native(method, lambda n: remora_v1.PictureRequest(model=n, image=b"x")))
        for method in ("Detect", "Segment", "Pose", "Depth")
    ),
    *(probe for service in vaccel.SERVICES for probe in _of_vaccel(service)),
    Probe("oip_rest", "metadata", "digest", _rest("GET", "/v2/models/{}")),
    Probe("oip_rest", "ready", "digest", _rest("GET", "/v2/models/{}/ready")),
    Probe("oip_rest", "infer", "digest", _rest("POST", "/v2/models/{}/infer", {"id": "77", "inputs": [NUMBER]})),
    Probe("oip_grpc", "ModelReady", "digest", _grpc("ModelReady", _model_request)),
    Probe("oip_grpc", "ModelMetadata", "digest", _grpc("ModelMetadata", _model_request)),
    Probe("oip_grpc", "ModelInfer", "digest", _grpc("ModelInfer", _infer_request)),
    Probe(
        "control",
        "Detach",
        "name",
        lambda pair, name: pair.raw.call(control_v1.SERVICE, "Detach", control_v1.DetachRequest(sandbox=name)),
    ),
)


def name_of(pair: Pair, kind: str) -> Any:
    """Return what Alice has."""
    return {
        "digest": pair.model,
        "session": pair.session,
        "resource": pair.resource,
        "token": pair.alice.token,
        "name": pair.names[0],
    }[kind]


def answer(pair: Pair, probe: Probe, name: Any) -> bytes:
    """Return the answer with the name taken out."""
    return probe.send(pair, name).replace(str(name).encode(), b"NAME")
