"""GenopStream: chunks of arguments that may claim anything of the whole. Messages, each after its length in a byte."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz_agent import agent
from remora.agent.doors.vaccel import VaccelDoor
from remora.errors import UnavailableError
from remora.wire import vaccel
from remora.wire.ttrpc.calls import Call, Calls
from remora.wire.ttrpc.frames import DATA, NO_DATA, REMOTE_CLOSED
from targets.ttrpc_frames import Wire
from targets.vaccel import arg, genop, numbered, peer_and_session

_door = VaccelDoor(agent().core)


def case(data: bytes) -> None:
    peer, session = peer_and_session()
    calls = Calls(Wire())
    made = Call(calls, 1, (vaccel.SERVICES[0], "GenopStream"), b"", (), None, True)
    calls.active[1] = made
    made.run(_door.handle, peer, made)
    at, first = 0, True
    while at < len(data) and not made.ended:
        size = data[at]
        body = data[at + 1 : at + 1 + size]
        at += 1 + size
        calls.received((1, DATA, 0, numbered(body, session) if first else body, None))
        first = False
    if not made.ended:
        calls.received((1, DATA, REMOTE_CLOSED | NO_DATA, b"", None))
    agent().settle()
    calls.cancel_all(UnavailableError("gone"))
    assert made.ended
    assert not agent().core.peers.in_flight_bytes[peer.identity.tenant]


def seeds() -> Iterator[bytes]:
    def joined(*messages: vaccel.GenopRequest) -> bytes:
        return b"".join(bytes([len(body)]) + body for body in (message.to_bytes() for message in messages))

    def chunk(data: bytes, size: int, parts: int, number: int) -> vaccel.GenopArg:
        return vaccel.GenopArg(buf=data, size=size, arg_type=0, parts=parts, part_no=number)

    yield joined(genop(18, [arg(b"data")], [arg(bytes(4))]))
    begin, room = genop(18, [], []), vaccel.GenopRequest(write_args=[arg(bytes(4))])
    halves = [vaccel.GenopRequest(read_args=[chunk(half, 4, 2, index)]) for index, half in ((1, b"da"), (2, b"ta"))]
    yield joined(begin, *halves, room)
    yield joined(begin, halves[1], halves[0])
    yield joined(begin, vaccel.GenopRequest(read_args=[chunk(b"x", (1 << 32) - 1, 1 << 20, 1)]))
