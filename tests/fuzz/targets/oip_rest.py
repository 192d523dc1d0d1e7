"""The Open Inference Protocol over HTTP/1.1: a connection's bytes, in pieces of any size, into the whole door."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from fake_link import FakeLink
from fuzz_agent import LIMITS, agent
from remora.agent.doors.oip import Inferences
from remora.agent.doors.oip_rest import RestDoor
from remora.agent.peers import Peer
from remora.agent.web.http1 import Http1
from remora.errors import UnavailableError

_agent = agent()
_inferences = Inferences(_agent.core)
_door = RestDoor(_agent.core, _inferences)
_peers: list[Peer] = []


def peer() -> Peer:
    if not _peers:
        _peers.append(_agent.join())
    return _peers[0]


def feed(
    data: bytes, step: int, link: FakeLink, buffer: Callable[[], memoryview], received: Callable[[int], None]
) -> None:
    """Hand bytes over as a socket would."""
    at = turns = 0
    while at < len(data) and not link.finished:
        if link.holding:
            turns += 1
            assert turns < 10_000, "a request is not answered"
            _agent.reactor.run_once(0)
            continue
        room = buffer()
        assert len(room), "there is no room to receive into"
        piece = data[at : at + min(step, len(room))]
        room[: len(piece)] = piece
        at += len(piece)
        received(len(piece))
    _agent.settle()


def case(data: bytes) -> None:
    if not data:
        return
    link, who = FakeLink(), peer()
    http1 = Http1(
        link,
        partial(_door.handle, who),
        scratch=_agent.reactor.scratch,
        allocate=partial(_agent.core.peers.allocate, who.identity.tenant),
        max_body_bytes=LIMITS.message_bytes,
        timeout_s=1.0,
        now_s=_agent.reactor.now_s,
        call_soon=_agent.reactor.call_soon,
    )
    feed(data[1:], (3, 64, 700, 8192)[data[0] & 3], link, http1.get_buffer, http1.received)
    http1.check(_agent.reactor.now_s() + 1e6)
    http1.closed(UnavailableError("gone"))
    _agent.settle()
    assert not _agent.core.peers.in_flight_bytes[who.identity.tenant]
    assert b" 500 " not in link.sent[:20]


def _request(verb: str, path: str, body: bytes = b"", *more: str) -> bytes:
    lines = [f"{verb} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more, "", ""]
    return b"\3" + "\r\n".join(lines).encode() + body


def seeds() -> Iterator[bytes]:
    tensor = {"name": "input", "shape": [2], "datatype": "FP32", "data": [1.0, 2]}
    infer = "/v2/models/identity/infer"
    yield _request("POST", infer, json.dumps({"id": "7", "inputs": [tensor], "outputs": [{"name": "input"}]}).encode())
    binary = {"name": "input", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    asked = json.dumps({"inputs": [binary], "parameters": {"binary_data_output": True, "timeout": 9}}).encode()
    head = f"Inference-Header-Content-Length: {len(asked)}"
    yield _request("POST", infer, asked + bytes(8), head)
    for path in (
        "/v2",
        "/v2/health/ready",
        "/v2/models/identity/versions/1",
        "/v2/models/identity/ready",
        "/v2/models/x",
    ):
        yield _request("GET", path) + _request("GET", "/v2/health/live", b"", "Connection: close")[1:]
    yield _request("POST", "/v2/repository/index", b'{"ready": true}', "Expect: 100-continue")
    yield _request("POST", infer, b"[[[[" * 40)
    yield _request(
        "POST", infer, b'{"inputs": [{"name": "input", "shape": [1], "datatype": "INT64", "data": [' + b"9" * 400
    )
    yield b"\0POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
