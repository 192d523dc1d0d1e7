"""GenopStream: a Genop whose arguments come in several messages, large ones in chunks.

Whole arguments stay in the message they came in. Chunks are put together in one block of the tenant's shared memory,
asked for by the length that the first of them announces, so that what a guest may hold this way is bounded by the same
limit as its messages (limits.in_flight_bytes_per_tenant).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from remora.agent.doors.vaccel_genop import GenopCalls
from remora.agent.doors.vaccel_replies import DECODE_LIMITS, Replies
from remora.agent.peers import Peer
from remora.errors import InvalidArgumentError, ResourceExhaustedError
from remora.reactor import Timer
from remora.wire import vaccel
from remora.wire.protobuf import DecodeError
from remora.wire.ttrpc.calls import Call

#: More than any operation takes; each costs a few hundred bytes of the agent's own memory.
_MAX_ARGS = 1024


class _Joining:
    """One argument of which some chunks have come."""

    __slots__ = ("arg", "filled", "next_no", "target", "view")

    def __init__(self, arg: vaccel.GenopArg, target: list[vaccel.GenopArg], view: memoryview) -> None:
        self.arg = arg
        self.target = target
        self.view = view
        self.filled = 0
        self.next_no = 1


class _Stream:
    """One GenopStream call until its last message."""

    def __init__(self, replies: Replies, genop: GenopCalls, peer: Peer, call: Call) -> None:
        self._replies = replies
        self._core = replies.core
        self._genop = genop
        self._peer = peer
        self._call = call
        self._request = vaccel.GenopRequest()
        self._joining: _Joining | None = None
        self._started_ns = time.monotonic_ns()
        limit_s = self._core.limits.request_timeout_s
        self._timer: Timer = self._core.reactor.call_later(limit_s, self._late)
        call.on_message = self._received
        call.on_half_close = self._complete
        call.on_cancel(lambda _reason: self._timer.cancel())

    def _late(self) -> None:
        limit_s = self._core.limits.request_timeout_s
        self._fail(ResourceExhaustedError(f"GenopStream was not complete after {limit_s} s (limits.request_timeout_s)"))

    def _fail(self, error: Exception) -> None:
        self._timer.cancel()
        self._joining = None
        self._replies.fail(self._peer, self._call, error)

    def _received(self, body: bytes | memoryview, release: Callable[[], None]) -> None:
        kept = False
        try:
            message = vaccel.GenopRequest.decode(body, limits=DECODE_LIMITS)
            if message.session_id:
                self._request.session_id = message.session_id
            for given, target in (
                (message.read_args, self._request.read_args),
                (message.write_args, self._request.write_args),
            ):
                for arg in given:
                    kept |= self._take(arg, target)
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            release()
            self._fail(error)
            return
        if kept:
            self._call.adopt(release)
        else:
            release()

    def _take(self, arg: vaccel.GenopArg, target: list[vaccel.GenopArg]) -> bool:
        """Add an argument or a chunk of one; True if the message's memory is still needed."""
        if len(self._request.read_args) + len(self._request.write_args) >= _MAX_ARGS:
            raise InvalidArgumentError(f"GenopStream has more than {_MAX_ARGS} arguments")
        if not arg.parts:
            if self._joining is not None:
                raise InvalidArgumentError("a whole argument came between the chunks of another one")
            target.append(arg)
            return True
        joining = self._joining
        if joining is None:
            block = self._core.peers.allocate(self._peer.identity.tenant, arg.size)
            self._call.adopt(block.release)
            joining = self._joining = _Joining(arg, target, block.view[: arg.size])
        stop = joining.filled + len(arg.buf)
        if (
            arg.part_no != joining.next_no
            or (arg.parts, arg.size) != (joining.arg.parts, joining.arg.size)
            or joining.target is not target
            or stop > len(joining.view)
        ):
            raise InvalidArgumentError(
                f"chunk {arg.part_no} of {arg.parts} ({arg.size} bytes) does not follow chunk {joining.next_no - 1} "
                f"of {joining.arg.parts} ({joining.arg.size} bytes)"
            )
        joining.view[joining.filled : stop] = arg.buf
        joining.filled = stop
        joining.next_no += 1
        if arg.part_no == arg.parts:
            self._joining = None
            whole = joining.view[:stop]
            target.append(
                vaccel.GenopArg(buf=whole, size=arg.size, arg_type=arg.arg_type, custom_type_id=arg.custom_type_id)
            )
        return False

    def _complete(self) -> None:
        self._timer.cancel()
        try:
            if self._joining is not None:
                raise InvalidArgumentError("GenopStream ended in the middle of an argument")
            self._genop.genop(self._peer, self._call, self._request, self._started_ns)
        except Exception as error:  # noqa: BLE001 - the border of a call: every failure is answered and reported
            self._fail(error)


class GenopStreams:
    """Answers `GenopStream`: a client stream under the asynchronous name, and the same under the other one."""

    def __init__(self, replies: Replies, genop: GenopCalls) -> None:
        self._replies = replies
        self._genop = genop

    def begin(self, peer: Peer, call: Call) -> None:
        """Take a call of it; one that is not streaming has its whole request in its payload."""
        if not call.client_streaming:
            self._genop.genop(peer, call, vaccel.GenopRequest.decode(call.payload, limits=DECODE_LIMITS))
            return
        if len(call.payload):
            raise DecodeError("GenopStream: the request frame has a payload; messages come as data frames")
        _Stream(self._replies, self._genop, peer, call)
