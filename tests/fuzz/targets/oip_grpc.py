"""The Open Inference Protocol over gRPC: a connection's HTTP/2 frames, in pieces of any size, into the whole door.

The first byte chooses the size of the pieces, and whether the preface is sent for the case.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial

from hpack import Encoder

from fake_link import FakeLink
from fuzz_agent import LIMITS, agent
from remora.agent.doors import oip_messages as messages
from remora.agent.doors.oip_grpc import GrpcDoor
from remora.agent.web.http2 import Http2
from remora.agent.web.http2_frames import PREFACE, header
from remora.errors import ProtocolError, UnavailableError
from remora.wire.protobuf import Message
from targets.oip_rest import _inferences, feed, peer

_agent = agent()
_door = GrpcDoor(_agent.core, _inferences)


def case(data: bytes) -> None:
    if not data:
        return
    link, who = FakeLink(), peer()
    http2 = Http2(
        link,
        partial(_door.handle, who),
        scratch=_agent.reactor.scratch,
        allocate=partial(_agent.core.peers.allocate, who.identity.tenant),
        max_body_bytes=LIMITS.message_bytes,
        max_streams=16,
        timeout_s=1.0,
        now_s=_agent.reactor.now_s,
    )
    sent = data[1:] if data[0] & 4 else PREFACE + data[1:]
    try:
        feed(sent, (9, 64, 1000, 16384)[data[0] & 3], link, http2.get_buffer, http2.received)
        http2.check(_agent.reactor.now_s() + 1e6)
    except ProtocolError:
        pass
    http2.closed(UnavailableError("gone"))
    _agent.settle()
    assert not _agent.core.peers.in_flight_bytes[who.identity.tenant]


_SETTINGS = header(0, 4, 0, 0)


def _headers(stream: int, method: str, *more: tuple[str, str]) -> bytes:
    block = Encoder().encode(
        [
            *((":method", "POST"), (":scheme", "http"), (":path", f"/{messages.SERVICE}/{method}")),
            *((":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers"), *more),
        ],
        huffman=False,
    )
    return header(len(block), 1, 4, stream) + block


def _data(stream: int, message: Message) -> bytes:
    body = message.to_bytes()
    return header(len(body) + 5, 0, 1, stream) + struct.pack(">BI", 0, len(body)) + body


def _infer() -> messages.ModelInferRequest:
    tensor = messages.InferInputTensor(name="input", datatype="FP32", shape=[2])
    value = messages.InferParameter(int64_param=5)
    return messages.ModelInferRequest(
        model_name="identity", inputs=[tensor], raw_input_contents=[bytes(8)], parameters={"timeout": value}, id="7"
    )


def seeds() -> Iterator[bytes]:
    start = b"\3" + _SETTINGS
    yield start + _headers(1, "ModelInfer", ("grpc-timeout", "5S")) + _data(1, _infer())
    typed = _infer()
    typed.raw_input_contents = []
    typed.inputs[0].contents = messages.InferTensorContents(fp32_contents=[1.0, 2.0]).to_bytes()
    yield start + _headers(1, "ModelInfer") + _data(1, typed)
    for method in ("ServerLive", "ServerReady", "ServerMetadata", "ModelConfig"):
        yield start + _headers(1, method) + _data(1, messages.Empty())
    for method in ("ModelReady", "ModelMetadata"):
        yield start + _headers(1, method) + _data(1, messages.ModelRequest(name="identity", version="1"))
    yield start + _headers(1, "RepositoryIndex") + _data(1, messages.RepositoryIndexRequest(ready=True))
    yield start + _headers(1, "ServerLive") + header(4, 3, 0, 1) + bytes(4) + header(8, 6, 0, 0) + b"pingpong"
    window = header(4, 8, 0, 0) + struct.pack(">I", 1000)
    setting = header(6, 4, 0, 0) + struct.pack(">HI", 4, 10)
    yield start + setting + window + _headers(1, "ModelInfer") + _data(1, _infer()) + _headers(3, "ServerLive")
    padded = header(10, 0, 9, 1) + b"\4" + struct.pack(">BI", 0, 0) + bytes(4)
    yield start + _headers(1, "ServerLive") + padded
    yield b"\7" + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS
