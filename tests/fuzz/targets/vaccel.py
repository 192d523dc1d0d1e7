"""The vAccel door: every method of both names with any request; in Genop requests, any arguments for any opcode.

Cases are: a byte for the method, then its request, in which a session number of 1 stands for a real one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from fuzz_agent import agent
from remora.agent.doors.vaccel import VaccelDoor
from remora.agent.peers import Peer
from remora.errors import UnavailableError
from remora.wire import vaccel
from remora.wire.protobuf import Message, int64
from remora.wire.vaccel_enums import ArgType
from targets.native import call

_METHODS = tuple(name for name in vaccel.METHODS if name not in ("GenopStream", "CreateSession"))
_door = VaccelDoor(agent().core)
_state: dict[str, int] = {"session": 0}
_peers: list[Peer] = []


def peer_and_session() -> tuple[Peer, int]:
    """Return a peer and the number of a session of its own, a new one if the last has ended."""
    if not _peers:
        _peers.append(agent().join())
    core = agent().core
    if (_peers[0].identity.key, _state["session"]) not in core.sessions._by_number:
        box: list[object] = []
        _state["session"] = core.sessions.create_numbered(_peers[0].identity, box.append).number
        agent().turn(lambda: box)
    return _peers[0], _state["session"]


def numbered(payload: bytes, session: int, field: int = 1) -> bytes:
    """Return a request for this session: the last one of a field counts."""

    class Number(Message):
        session_id: int = int64(field)

    return payload + Number(session_id=session).to_bytes()


_FIELDS = {"RegisterResource": 5, "UnregisterResource": 2}


def case(data: bytes) -> None:
    if not data:
        return
    method = _METHODS[data[0] % len(_METHODS)]
    peer, session = peer_and_session()
    payload = data[1:]
    if data[0] < 128 and method != "SyncResource":
        payload = numbered(payload, session, _FIELDS.get(method, 1))
    calls, made = call(peer, vaccel.SERVICES[data[0] >> 6 & 1], method, payload)
    _door.handle(peer, made)
    agent().settle()
    calls.cancel_all(UnavailableError("gone"))
    assert made.ended


def arg(data: bytes, kind: int = ArgType.RAW) -> vaccel.GenopArg:
    return vaccel.GenopArg(buf=data, size=len(data), arg_type=kind)


def genop(opcode: int, read: Sequence[vaccel.GenopArg], write: Sequence[vaccel.GenopArg]) -> vaccel.GenopRequest:
    first = arg(bytes([opcode]), ArgType.UINT8)
    return vaccel.GenopRequest(read_args=[first, *read], write_args=[*write])


def requests() -> Iterator[vaccel.GenopRequest]:
    """Yield a good request for every opcode."""
    floats = arg(struct.pack("<4f", 1, 2, 3, 4), ArgType.FLOAT32_ARRAY)
    one, number = arg(struct.pack("<q", 2), ArgType.INT64), arg(struct.pack("<f", 1), ArgType.FLOAT32)
    picture, text = arg(b"\xff\xd8picture", ArgType.BUFFER), arg(bytes(16), ArgType.UCHAR_ARRAY)
    yield genop(17, [one, one, one, number, floats, one, floats, one, number, one], [floats])
    yield genop(3, [picture], [text, text])
    for opcode in (4, 5, 6, 7):
        yield genop(opcode, [picture], [text])
    yield genop(18, [arg(bytes(16))], [arg(bytes(16))])
    yield genop(19, [floats, floats], [floats])
    yield genop(20, [floats, floats], [floats, floats])
    yield genop(21, [floats, floats], [floats])
    yield genop(22, [arg(bytes(32)), *[arg(struct.pack("<i", 4))] * 3], [arg(bytes(32)), arg(bytes(8)), arg(bytes(8))])
    for opcode in (1, 2, 8, 16, 23):
        yield genop(opcode, [arg(b"/lib/x\0", ArgType.STRING), arg(b"f\0", ArgType.STRING)], [floats])


def seeds() -> Iterator[bytes]:
    def one(method: str, message: Message) -> bytes:
        return bytes([_METHODS.index(method)]) + message.to_bytes()

    for request in requests():
        yield one("Genop", request)
    blob = vaccel.ResourceBlob(type_=1, name="m", data=b"model", size=5)
    yield one("RegisterResource", vaccel.ResourceRegisterRequest(resource_type=2, blobs=[blob]))
    yield one("RegisterResource", vaccel.ResourceRegisterRequest(resource_type=2, paths=["/etc/passwd"]))
    yield one("SyncResource", vaccel.ResourceSyncRequest(resource_id=5))
    yield one("ImageClassification", vaccel.ImageRequest(image=b"picture"))
    for method in _METHODS:
        yield bytes([_METHODS.index(method)])
    for method in ("TorchModelRun", "TensorflowModelRun", "TensorflowLiteModelRun"):
        yield bytes([_METHODS.index(method)]) + b"\x10\x05\x22\x0d\x0a\x04\0\0\x80\x3f\x12\x04\1\1\1\1\x18\7\x28\1"
