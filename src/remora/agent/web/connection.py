"""A socket that speaks HTTP/1.1 or HTTP/2, whichever its first bytes say, on the reactor.

One port serves both: an HTTP/2 client that knows what it wants begins with a preface that is no HTTP/1.1 request
(RFC 9113, section 3.4), and gRPC without TLS does exactly that. What is bounded here is what both share: unsent bytes,
the time they may take, and the farewell; see `http1` and `http2` for the bounds of requests.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence

from remora.agent.web.exchange import Link, Piece, Speaker
from remora.agent.web.http2_frames import PREFACE
from remora.errors import ProtocolError, RemoraError, UnavailableError
from remora.reactor import READ, WRITE, Reactor, Timer, is_hangup
from remora.wire.ttrpc.reactor import unsent

#: Reads of one connection before others get their turn.
_READS_PER_TURN = 16
#: The kernel takes this many buffers at once (IOV_MAX, sendmsg(2)).
_MAX_PIECES = 1024
#: How long a peer that was told to go may go on sending, so that it can read why.
_FAREWELL_S = 2.0

MakeSpeaker = Callable[[Link], Speaker]


class WebConnection:
    """One client of the door; owns its socket.

    Args:
        http1, http2: Make the protocol of this connection.
        on_close: Called once when the connection is gone; its exchanges have been cancelled by then.
        on_refused: Called with the error of a request that no handler saw.
        first_s: How long the first bytes may take to say which protocol it is, once begun.
    """

    __slots__ = (
        "_closing",
        "_events",
        "_fd",
        "_first",
        "_held",
        "_makers",
        "_max_out_bytes",
        "_on_close",
        "_on_refused",
        "_out",
        "_out_bytes",
        "_reactor",
        "_send_timeout_s",
        "_send_timer",
        "_sock",
        "_speaker",
        "_timer",
        "closed",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        *,
        http1: MakeSpeaker,
        http2: MakeSpeaker,
        on_close: Callable[[], None],
        on_refused: Callable[[RemoraError], None],
        max_out_bytes: int,
        send_timeout_s: float,
    ) -> None:
        sock.setblocking(False)
        self.closed = False
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._makers = (http1, http2)
        self._on_close = on_close
        self._on_refused = on_refused
        self._max_out_bytes = max_out_bytes
        self._send_timeout_s = send_timeout_s
        self._speaker: Speaker | None = None
        self._first = b""
        self._out: deque[tuple[list[Piece], Callable[[], None] | None]] = deque()
        self._out_bytes = 0
        self._held = False
        self._closing = False
        self._events = READ
        self._timer: Timer | None = None
        self._send_timer: Timer | None = None
        reactor.register(self._fd, READ, self._ready)

    @property
    def out_bytes(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return self._out_bytes + (self._speaker.unsent_bytes if self._speaker is not None else 0)

    @property
    def in_flight(self) -> int:
        """1 while a request is on its way in or is being answered."""
        return int(self._speaker is not None and self._speaker.busy)

    @property
    def receiving(self) -> bool:
        """True if a part of a request has come."""
        return bool(self._first)

    def leave(self, *, gently: bool) -> None:
        """Take no new request, finish what is under way, close. Call it again until it is closed."""
        if self._speaker is not None:
            self._speaker.leave()
        elif not (gently and self._first):
            self.close()

    # -- what the speaker uses (`exchange.Link`) --------------------------------------------------------------------

    def transmit(self, pieces: Sequence[Piece], on_sent: Callable[[], None] | None = None) -> None:
        left = list(pieces)
        if not self.closed and not self._out:
            left = unsent(left, self._send(left))
        if self.closed or not left:
            if on_sent is not None:
                on_sent()
            return
        if not self._out:
            self._send_timer = self._reactor.call_later(self._send_timeout_s, self._send_timed_out)
        self._out.append((left, on_sent))
        self._out_bytes += sum(map(len, left))
        self._update_events()

    def refused(self, error: RemoraError) -> None:
        self._on_refused(error)

    def hold(self, reading: bool) -> None:
        self._held = reading
        self._update_events()

    def finish(self) -> None:
        if self.closed or self._closing:
            return
        self._closing = True
        if not self._out:
            self._say_goodbye()
        self._update_events()

    # -- closing ----------------------------------------------------------------------------------------------------

    def close(self, reason: RemoraError | None = None) -> None:
        """Close at once; exchanges are cancelled with `reason`, of which the operator is told."""
        if self.closed:
            return
        self.closed = True
        self._reactor.unregister(self._fd)
        self._sock.close()
        for timer in (self._timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        out, self._out, self._out_bytes = self._out, deque(), 0
        try:
            for _pieces, on_sent in out:
                if on_sent is not None:
                    on_sent()
            if self._speaker is not None:
                self._speaker.closed(reason or UnavailableError("the client has closed the connection"))
        finally:
            self._on_close()
            if reason is not None:
                self.refused(reason)

    def _say_goodbye(self) -> None:
        """Everything is sent: closing now, with bytes unread, would take it from the peer again (TCP's RST)."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._reactor.call_soon(self.close)
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_later(_FAREWELL_S, self.close)

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
        for _ in range(_READS_PER_TURN):
            speaker = self._speaker
            discard = self._closing or speaker is None
            buffer = self._reactor.scratch if discard or speaker is None else speaker.get_buffer()
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if count == 0:
                self.close()
                return
            if self._closing:
                continue
            try:
                if speaker is None:
                    self._recognise(buffer[:count])
                else:
                    speaker.received(count)
            except ProtocolError as error:
                self.close(error)
            if self.closed:
                return
            if count < len(buffer) or not self._events & READ:
                break
        self._watch()

    def _recognise(self, data: memoryview) -> None:
        """Choose the protocol by the first bytes, and hand them on."""
        first = self._first + bytes(data)
        if len(first) < len(PREFACE) and PREFACE.startswith(first):
            self._first = first
            return
        self._first = b""
        speaker = self._speaker = self._makers[first.startswith(PREFACE)](self)
        while first and not self.closed and not self._closing:
            buffer = speaker.get_buffer()
            count = min(len(first), len(buffer))
            buffer[:count] = first[:count]
            speaker.received(count)
            first = first[count:]

    def _update_events(self) -> None:
        if self.closed:
            return
        full = not self._closing and (self._held or self._out_bytes > self._max_out_bytes)
        events = (0 if full else READ) | (WRITE if self._out else 0)
        if events != self._events:
            self._events = events
            self._reactor.modify(self._fd, events)

    # -- sending ----------------------------------------------------------------------------------------------------

    def _send(self, pieces: list[Piece]) -> int:
        """Return how many bytes the socket took, 0 also if it is broken (the connection is closed soon then)."""
        try:
            return self._sock.sendmsg(pieces[:_MAX_PIECES])
        except BlockingIOError:
            return 0
        except OSError:
            # Not from here: the caller may be in the middle of a request's handling.
            self._reactor.call_soon(self.close)
            return 0

    def _flush(self) -> None:
        progress = False
        while self._out:
            pieces, on_sent = self._out[0]
            sent = self._send(pieces)
            if not sent:
                break
            progress = True
            self._out_bytes -= sent
            left = unsent(pieces, sent)
            if left:
                self._out[0] = (left, on_sent)
                continue
            self._out.popleft()
            if on_sent is not None:
                on_sent()
            if self.closed:
                return
        if progress and self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        if self._out and self._send_timer is None:
            self._send_timer = self._reactor.call_later(self._send_timeout_s, self._send_timed_out)
        if not self._out and self._closing:
            self._say_goodbye()
        self._update_events()

    # -- time -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have the speaker look at what takes long, as long as something is under way."""
        if self._timer is not None or self.closed or self._closing:
            return
        now_s = self._reactor.now_s()
        if self._speaker is None:
            next_s = now_s + self._send_timeout_s if self._first else None
        else:
            next_s = self._speaker.check(now_s)
        if next_s is not None and not self._closing:
            self._timer = self._reactor.call_later(max(0.01, next_s - now_s), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._speaker is None:
            self.close()
        else:
            self._watch()

    def _send_timed_out(self) -> None:
        self.close(UnavailableError(f"the client has not read its answers for {self._send_timeout_s:g} s"))
