"""The native door: each method's request with any content. The first byte chooses the method."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fuzz_agent import agent
from remora.agent.doors.native import NativeDoor
from remora.agent.peers import Peer
from remora.errors import UnavailableError
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.calls import Call, Calls
from remora.workers.arena import Region
from targets.ttrpc_frames import Wire

_METHODS = tuple(v1.METHODS)
_door = NativeDoor(agent().core)
_peers: list[Peer] = []


def call(peer: Peer, service: str, method: str, payload: bytes) -> tuple[Calls, Call]:
    """Make a call as a connection would; return the connection's calls, and it."""
    calls = Calls(Wire())
    made = Call(calls, 1, (service, method), payload, (), None, False)
    calls.active[1] = made
    return calls, made


def _peer() -> Peer:
    """Return a peer with a session: a new one where a case has closed it."""
    while not _peers or _peers[0].session is None or _peers[0].session.ended:
        if _peers:
            gone = _peers.pop()
            gone.regions = None
            agent().core.peers.leave(gone)
        peer = agent().join()
        peer.regions = {1: Region(peer.identity.tenant, 1 << 20)}
        _calls, hello = call(peer, v1.SERVICE, "Hello", v1.HelloRequest(version=1).to_bytes())
        _door.handle(peer, hello)
        agent().turn(partial(getattr, hello, "ended"))
        _peers.append(peer)
    return _peers[0]


def case(data: bytes) -> None:
    if not data:
        return
    method = _METHODS[data[0] % len(_METHODS)]
    calls, made = call(_peer(), v1.SERVICE, method, data[1:])
    _door.handle(_peers[0], made)
    agent().settle()
    calls.cancel_all(UnavailableError("gone"))
    assert made.ended


def _one(method: str, message: Message) -> bytes:
    return bytes([_METHODS.index(method)]) + message.to_bytes()


def seeds() -> Iterator[bytes]:
    digest = "sha256:" + "a" * 64
    tensor = v1.Tensor(name="input", dtype="float32", shape=[1, 2], data=bytes(8))
    yield _one("Infer", v1.InferRequest(model="identity", inputs=[tensor], outputs=["output"], request_id=7))
    placed = v1.Tensor(name="input", dtype="float32", shape=[1, 2], offset=64)
    yield _one("Infer", v1.InferRequest(model="identity", inputs=[placed], region=1, output_offset=64, output_bytes=64))
    endless = v1.Tensor(name="input", dtype="float32", shape=[1 << 62] * 300, offset=64)
    yield _one("Infer", v1.InferRequest(model="identity", inputs=[endless], region=1))
    yield _one("Share", v1.ShareRequest(token=bytes(32), size_bytes=1 << 20))
    yield _one("Classify", v1.ClassifyRequest(model="pictures", image=b"picture", top=3))
    yield _one("PutResource", v1.PutResourceRequest(digest=digest, offset=0, total_bytes=9, data=b"data"))
    yield _one("StatResource", v1.StatResourceRequest(digest=digest))
    yield _one("LoadModel", v1.LoadModelRequest(model="identity", format="onnx"))
    yield _one("LoadModel", v1.LoadModelRequest(model=digest))
    yield _one("UnloadModel", v1.UnloadModelRequest(model="identity"))
    yield _one("Noop", v1.NoopRequest(data=b"data", request_id=1))
    yield _one("Hello", v1.HelloRequest(version=1, client="fuzz", token=bytes(32)))
    yield _one("Models", v1.Empty())
