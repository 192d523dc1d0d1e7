"""Sending Genop: in one message, or in a stream of chunks where the agent takes one.

vAccel's rule: read arguments first, then write arguments; arguments share a message while it stays below 4 MiB (stock
ttrpc's limit); a larger one is cut into chunks, each in a message of its own.
"""

from __future__ import annotations

import errno

from remora.vaccel import link
from remora.vaccel.errors import FFIError
from remora.wire import vaccel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, List, Sequence

    from remora.vaccel.arg import Arg

_MESSAGE_BYTES = 4 << 20
#: Room for everything of a message but the chunk's bytes.
_CHUNK_BYTES = _MESSAGE_BYTES - 64


def messages_of(request: vaccel.GenopRequest) -> Iterator[vaccel.GenopRequest]:
    """Cut a request into messages that a server with ttrpc's stock limit takes."""
    session = request.session_id
    pending = vaccel.GenopRequest(session_id=session)
    for name in ("read_args", "write_args"):
        for arg in getattr(request, name):
            getattr(pending, name).append(arg)
            if pending.byte_size() < _MESSAGE_BYTES:
                continue
            getattr(pending, name).pop()
            if pending.read_args or pending.write_args:
                yield pending
            pending = vaccel.GenopRequest(session_id=session)
            if arg.byte_size() < _CHUNK_BYTES:
                getattr(pending, name).append(arg)
                continue
            yield from _chunks(session, name, arg)
    if pending.read_args or pending.write_args:
        yield pending


def _chunks(session: int, name: str, arg: vaccel.GenopArg) -> Iterator[vaccel.GenopRequest]:
    data = memoryview(arg.buf)
    parts = -(-len(data) // _CHUNK_BYTES)
    for number in range(parts):
        chunk = vaccel.GenopArg(
            buf=data[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES],
            size=len(data),
            arg_type=arg.arg_type,
            custom_type_id=arg.custom_type_id,
            parts=parts,
            part_no=number + 1,
        )
        message = vaccel.GenopRequest(session_id=session)
        getattr(message, name).append(chunk)
        yield message


def genop(session_id: int, read: Sequence[Arg], write: Sequence[Arg]) -> None:
    """Run an operation; what it writes goes into `write`.

    Raises:
        FFIError: it failed, or its answer does not fit what was asked.
    """
    request = vaccel.GenopRequest(
        session_id=session_id,
        read_args=[arg.to_wire() for arg in read],
        write_args=[arg.to_wire() for arg in write],
    )
    size = sum(arg.room() for arg in (*read, *write))
    if size >= _CHUNK_BYTES and link.streams():
        answer = link.stream_genop(messages_of(request))
    else:
        answer = link.call("Genop", request, vaccel.GenopResponse)
    _take(answer.write_args, write)


def _take(answers: List[vaccel.GenopArg], write: Sequence[Arg]) -> None:
    if len(answers) != len(write):
        raise FFIError(errno.EPROTO, f"the agent answered with {len(answers)} arguments, {len(write)} were asked for")
    for answer, arg in zip(answers, write):  # noqa: B905 - strict= came with Python 3.10
        if len(answer.buf) > arg.room():
            raise FFIError(errno.EPROTO, f"the agent wrote {len(answer.buf)} bytes where {arg.room()} have room")
    for answer, arg in zip(answers, write):  # noqa: B905 - strict= came with Python 3.10
        arg.written(memoryview(answer.buf))
