"""The ttrpc server on `remora.reactor`: many connections, one thread, bounded memory for each.

A peer that sends too fast, reads too slowly or stops in the middle of a frame costs only itself: its connection is not
read while it has `max_in_flight` calls open or `max_out_bytes` waiting to be sent, and it is closed when a frame or an
answer makes no progress for too long. An idle connection owns no buffer.
"""

from __future__ import annotations

import os
import socket
from collections import deque

from remora.errors import ProtocolError, RemoraError, UnavailableError
from remora.reactor import READ, WRITE, Reactor, Timer, is_hangup
from remora.wire.protobuf import gather
from remora.wire.ttrpc.calls import Call, Calls
from remora.wire.ttrpc.frames import DEFAULT_MAX_MESSAGE_BYTES, SCRATCH_BYTES, FrameDecoder
from remora.wire.ttrpc.listener import Listener, listen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Deque, List, Optional, Tuple

    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.frames import Allocate

    Handler = Callable[[Call], None]

__all__ = ["Call", "Listener", "ServerConnection", "listen"]

#: Reads of one connection before others get their turn.
_READS_PER_TURN = 16
#: The kernel takes this many buffers at once (IOV_MAX, sendmsg(2)).
_MAX_PIECES = 1024


class ServerConnection:
    """One client. All calls are made, and must be answered, in the reactor's thread.

    Args:
        handler: Called with each new `Call`; answers now or later. A RemoraError that it raises is the answer.
        max_message_bytes: Largest message body; larger ones are answered with RESOURCE_EXHAUSTED and skipped.
        limit_name: What says so, for that answer.
        allocate: Makes the blocks of large bodies, see `frames.FrameDecoder`.
        on_close: Called once when the connection is gone; its calls have been cancelled by then.
        on_refused: Called with the error of a request that no handler saw, or that closed the connection.
        max_in_flight: Open calls beyond which nothing more is read; what came in the same 8 KiB is still served.
        max_out_bytes: Unsent bytes beyond which nothing more is read.
        frame_timeout_s: How long a begun frame may take, besides the time for its bytes at 64 KiB/s.
        send_timeout_s: How long unsent bytes may make no progress.
    """

    __slots__ = (
        "reactor",
        "sock",
        "closed",
        "_fd",
        "_handler",
        "_decoder",
        "_calls",
        "_on_close",
        "_on_refused",
        "_max_in_flight",
        "_max_out_bytes",
        "_frame_timeout_s",
        "_send_timeout_s",
        "_out",
        "_out_bytes",
        "_events",
        "_paused",
        "_leaving",
        "_frame_timer",
        "_send_timer",
        "_deadline_timer",
        "_passed_fd",
        "__weakref__",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        handler: Handler,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        limit_name: str = "",
        allocate: Optional[Allocate] = None,
        on_close: Optional[Callable[[ServerConnection], None]] = None,
        on_refused: Optional[Callable[[RemoraError], None]] = None,
        max_in_flight: int = 256,
        max_out_bytes: int = 8 << 20,
        frame_timeout_s: float = 30.0,
        send_timeout_s: float = 30.0,
    ) -> None:
        sock.setblocking(False)
        self.reactor = reactor
        self.sock = sock
        self.closed = False
        self._fd = sock.fileno()
        self._handler = handler
        self._decoder = FrameDecoder(
            max_message_bytes, scratch=reactor.scratch[:SCRATCH_BYTES], allocate=allocate, limit_name=limit_name
        )
        self._calls = Calls(self)
        self._on_close = [] if on_close is None else [on_close]
        self._on_refused = on_refused
        self._max_in_flight = max_in_flight
        self._max_out_bytes = max_out_bytes
        self._frame_timeout_s = frame_timeout_s
        self._send_timeout_s = send_timeout_s
        self._out: Optional[Deque[Tuple[List[Piece], Optional[Callable[[], None]]]]] = None
        self._out_bytes = 0
        self._events = READ
        self._paused = 0
        self._leaving = False
        self._frame_timer: Optional[Timer] = None
        self._send_timer: Optional[Timer] = None
        self._deadline_timer: Optional[Timer] = None
        self._passed_fd = -1
        reactor.register(self._fd, READ, self._ready)

    @property
    def out_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._out_bytes

    @property
    def in_flight(self) -> int:
        return len(self._calls.active)

    @property
    def receiving(self) -> bool:
        """True if a part of a message has come."""
        return self._decoder.partial_bytes > 0

    def leave(self, *, gently: bool) -> None:
        """Close the connection if no call is open and nothing unsent; call it again until it is closed.

        Args:
            gently: Go on reading, and leave a connection alone on which more is coming. Otherwise what comes is left
                unread: a client whose connection ends sends it again.
        """
        if not gently and not self._leaving:
            self._leaving = True
            self.pause()
        if not self.in_flight and not self._out_bytes and not (gently and (self.receiving or self._is_readable())):
            self.close()

    def _is_readable(self) -> bool:
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:  # nothing, or broken
            return False

    def add_close_callback(self, callback: Callable[[ServerConnection], None]) -> None:
        self._on_close.append(callback)

    def pause(self) -> None:
        """Read nothing until as many `resume` follow: for a handler that cannot take more of a client's stream."""
        self._paused += 1
        self._update_events()

    def resume(self) -> None:
        self._paused -= 1
        self._update_events()

    def close(self, reason: Optional[RemoraError] = None) -> None:
        """Close the connection; its calls are cancelled with `reason`, of which the operator is told."""
        if self.closed:
            return
        self.closed = True
        self.reactor.unregister(self._fd)
        self.sock.close()
        self._decoder.close()
        if self._passed_fd >= 0:
            os.close(self._passed_fd)
            self._passed_fd = -1
        for timer in (self._frame_timer, self._send_timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        try:
            self._calls.cancel_all(reason or UnavailableError("the client has closed the connection"))
        finally:
            out, self._out, self._out_bytes = self._out, None, 0
            for _pieces, on_sent in out or ():
                if on_sent is not None:
                    on_sent()
            callbacks, self._on_close = self._on_close, []
            for callback in callbacks:
                callback(self)
            if reason is not None:
                self.refused(reason)

    # -- what calls use ---------------------------------------------------------------------------------------------

    def transmit(self, pieces: List[Piece], on_sent: Optional[Callable[[], None]] = None) -> None:
        """Send a frame now if the socket takes it, else queue it (`calls.Transport`)."""
        if self.closed:
            if on_sent is not None:
                on_sent()
            return
        pieces = gather(pieces)
        if self._out is None:
            sent = self._send(pieces)
            if sent < 0:
                if on_sent is not None:
                    on_sent()
                return
            pieces = unsent(pieces, sent)
            if not pieces:
                if on_sent is not None:
                    on_sent()
                return
            self._out = deque()
            self._send_timer = self.reactor.call_later(self._send_timeout_s, self._send_timed_out)
        self._out.append((pieces, on_sent))
        self._out_bytes += sum(map(len, pieces))
        self._update_events()

    def call_ended(self, call: Call) -> None:
        """(`calls.Transport`)"""
        if self._events & READ == 0:
            self._update_events()

    def refused(self, error: RemoraError) -> None:
        """(`calls.Transport`)"""
        if self._on_refused is not None:
            self._on_refused(error)

    def report(self, error: BaseException) -> None:
        """(`calls.Transport`)"""
        self.reactor.on_error(error)

    def pass_fd(self, fd: int) -> None:
        """Send a copy of `fd` along with the next frame (Unix sockets only)."""
        self._passed_fd = os.dup(fd)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if self.closed:
            return
        if self._events & READ:
            if events & ~WRITE:
                self._read()
        elif is_hangup(events):
            self.close()

    def _read(self) -> None:
        decoder, sock = self._decoder, self.sock
        for _ in range(_READS_PER_TURN):
            buffer = decoder.get_buffer()
            try:
                count = sock.recv_into(buffer)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if count == 0:
                self.close()
                return
            try:
                for frame in decoder.received(count):
                    call = self._calls.received(frame)
                    if call is not None:
                        self._handle(call)
                    if self.closed:
                        return
            except ProtocolError as error:
                self.close(error)
                return
            if len(self._calls.active) >= self._max_in_flight:
                self._update_events()
            if count < len(buffer) or not self._events & READ:
                break
        if self._frame_timer is None and decoder.partial_bytes:
            self._watch_frame()

    def _handle(self, call: Call) -> None:
        if call.deadline_s is not None:
            self._watch_deadline(call.deadline_s)
        call.run(self._handler, call)

    def _update_events(self) -> None:
        if self.closed:
            return
        full = (
            self._paused > 0 or len(self._calls.active) >= self._max_in_flight or self._out_bytes > self._max_out_bytes
        )
        events = (0 if full else READ) | (0 if self._out is None else WRITE)
        if events != self._events:
            self._events = events
            self.reactor.modify(self._fd, events)

    # -- sending ----------------------------------------------------------------------------------------------------

    def _send(self, pieces: List[Piece]) -> int:
        """Return how many bytes the socket took; -1 if it is broken (the connection is closed then)."""
        try:
            if self._passed_fd >= 0:
                return self._send_fd(pieces)
            if len(pieces) == 1:
                return self.sock.send(pieces[0])
            return self.sock.sendmsg(pieces[:_MAX_PIECES])
        except BlockingIOError:
            return 0
        except OSError:
            # Not from here: the caller may be in the middle of a frame's handling.
            self.reactor.call_soon(self.close)
            return -1

    def _send_fd(self, pieces: List[Piece]) -> int:
        sent = socket.send_fds(self.sock, pieces[:_MAX_PIECES], [self._passed_fd])
        os.close(self._passed_fd)
        self._passed_fd = -1
        return sent

    def _flush(self) -> None:
        progress = False
        while self._out:
            pieces, on_sent = self._out[0]
            sent = self._send(pieces)
            if sent < 0:
                return
            if sent == 0:
                break
            progress = True
            self._out_bytes -= sent
            pieces = unsent(pieces, sent)
            if pieces:
                self._out[0] = (pieces, on_sent)
                continue
            self._out.popleft()
            if on_sent is not None:
                on_sent()
            if self.closed:
                return
        if progress and self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        if not self._out:
            self._out = None
        elif self._send_timer is None:
            self._send_timer = self.reactor.call_later(self._send_timeout_s, self._send_timed_out)
        self._update_events()

    def _send_timed_out(self) -> None:
        self.close(UnavailableError(f"the client has not read its answers for {self._send_timeout_s:g} s"))

    # -- time -------------------------------------------------------------------------------------------------------

    def _watch_frame(self) -> None:
        mark = self._decoder.frames
        allowed_s = self._decoder.allowed_s(self._frame_timeout_s)

        def check() -> None:
            self._frame_timer = None
            if not self._decoder.partial_bytes:
                return
            if self._decoder.frames == mark and self._events & READ:
                self.close(ProtocolError(f"the client stopped for {allowed_s:.0f} s in the middle of a message"))
            else:
                self._watch_frame()

        self._frame_timer = self.reactor.call_later(allowed_s, check)

    def _watch_deadline(self, deadline_s: float) -> None:
        timer = self._deadline_timer
        if timer is not None:
            if timer.when_s <= deadline_s:
                return
            timer.cancel()
        self._deadline_timer = self.reactor.call_later(deadline_s - self.reactor.now_s(), self._expire)

    def _expire(self) -> None:
        self._deadline_timer = None
        next_s = self._calls.expire()
        if next_s is not None and not self.closed:
            self._watch_deadline(next_s)


def unsent(pieces: List[Piece], sent: int) -> List[Piece]:
    """Return what is left of `pieces` when `sent` bytes of them are gone."""
    for index, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *pieces[index + 1 :]] if sent else pieces[index:]
        sent -= len(piece)
    return []
