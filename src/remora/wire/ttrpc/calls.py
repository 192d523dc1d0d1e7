"""The server's half of ttrpc without I/O: which calls are open on a connection, and how each may be answered.

A call may be answered at any time and from any frame order: containerd's `Wait` stays open for a process's whole life.
The transports (reactor, asyncio) read frames, pass them to `Calls` and send what calls transmit.
"""

from __future__ import annotations

import time

from remora.errors import DeadlineExceededError, InternalError, InvalidArgumentError, ProtocolError, RemoraError
from remora.wire.protobuf import DecodeError
from remora.wire.protobuf_kinds import read_length, read_varint
from remora.wire.ttrpc.core import data_frame, error_frame, response_frame
from remora.wire.ttrpc.frames import DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST
from remora.wire.ttrpc.messages import ENVELOPE_LIMITS, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, Union

    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.core import Body
    from remora.wire.ttrpc.frames import Block, Frame
    from remora.wire.ttrpc.messages import KeyValue

    class Transport(Protocol):
        """The connection as a call sees it."""

        def transmit(self, pieces: List[Piece], on_sent: Optional[Callable[[], None]] = None) -> None:
            """Send a frame; `on_sent` is called once its buffers are no longer needed, sent or not."""

        def call_ended(self, call: Call) -> None: ...

        def refused(self, error: RemoraError) -> None:
            """Tell the operator of a request that was answered with an error before a handler saw it."""

        def report(self, error: BaseException) -> None:
            """Tell the operator of a fault in a handler."""


#: Parsed starts of requests, by their bytes. The bound keeps peers from filling it; what does not fit is parsed anew.
_MAX_CACHED = 512
_known: Dict[bytes, Tuple[str, str]] = {}
_timeouts: Dict[bytes, int] = {}
#: Key and varint; longer ones are left to the codec.
_LONGEST_TIMEOUT = 11


class Call:
    """One request of a peer.

    `payload` may lie in a block that lives until the answer is sent or the call is cancelled; after `retain`, until
    `release`.
    """

    __slots__ = (
        "connection",
        "stream_id",
        "service",
        "method",
        "payload",
        "deadline_s",
        "client_open",
        "client_streaming",
        "ended",
        "on_message",
        "on_half_close",
        "_calls",
        "_metadata",
        "_on_cancel",
        "_block",
        "_adopted",
        "_holders",
    )

    def __init__(
        self,
        calls: Calls,
        stream_id: int,
        names: Tuple[str, str],
        payload: Piece,
        metadata: Sequence[KeyValue],
        block: Optional[Block],
        client_streaming: bool,
    ) -> None:
        self.connection = calls.connection
        self.stream_id = stream_id
        self.service, self.method = names
        self.payload = payload
        #: On the monotonic clock; None for no deadline. The connection answers when it passes.
        self.deadline_s: Optional[float] = None
        #: The client announced that it will send messages on this call, and may still do so.
        self.client_streaming = self.client_open = client_streaming
        #: Answered, failed or cancelled.
        self.ended = False
        #: Called with each further message and a function that gives its memory back; call that when done with it.
        self.on_message: Optional[Callable[[Piece, Callable[[], None]], None]] = None
        self.on_half_close: Optional[Callable[[], None]] = None
        self._calls = calls
        self._metadata = metadata
        self._on_cancel: Optional[Callable[[RemoraError], None]] = None
        self._block = block
        self._adopted: Optional[List[Callable[[], None]]] = None
        self._holders = 1

    @property
    def metadata(self) -> Dict[str, List[str]]:
        found: Dict[str, List[str]] = {}
        for pair in self._metadata:
            found.setdefault(pair.key, []).append(pair.value)
        return found

    def header(self, name: str) -> str:
        """Return the first value of a key of the metadata, empty if it is not there."""
        for pair in self._metadata:
            if pair.key == name:
                return pair.value
        return ""

    def on_cancel(self, callback: Callable[[RemoraError], None]) -> None:
        """Call with the reason when the peer is gone or the deadline has passed before the answer."""
        self._on_cancel = callback

    # -- answering --------------------------------------------------------------------------------------------------

    def respond(self, body: Body, *, on_sent: Optional[Callable[[], None]] = None) -> bool:
        """Answer with a message, or its encoded pieces. Returns False if the call was over already.

        `on_sent` is called exactly once, when the pieces are no longer needed, whatever became of the call.
        """
        return self._finish(response_frame(self.stream_id, body) if not self.ended else [], on_sent)

    def fail(self, error: RemoraError, details: Sequence[Any] = ()) -> bool:
        """Answer with an error status. Returns False if the call was over already."""
        return self._finish(error_frame(self.stream_id, error, details) if not self.ended else [], None)

    def send(self, body: Body, *, on_sent: Optional[Callable[[], None]] = None) -> bool:
        """Send one message of a server stream. Returns False if the call is over."""
        if self.ended:
            if on_sent is not None:
                on_sent()
            return False
        self.connection.transmit(data_frame(self.stream_id, body), on_sent)
        return True

    def finish(self) -> bool:
        """End a server stream. Returns False if the call was over already."""
        return self._finish(data_frame(self.stream_id, None, REMOTE_CLOSED | NO_DATA) if not self.ended else [], None)

    def _finish(self, pieces: List[Piece], on_sent: Optional[Callable[[], None]]) -> bool:
        if self.ended:
            if on_sent is not None:
                on_sent()
            return False
        self._end()
        if self._block is None and self._adopted is None:
            self.connection.transmit(pieces, on_sent)
        else:  # the answer may be made of the request's bytes: they stay until it is sent
            self.connection.transmit(pieces, self.release if on_sent is None else self._sent_then(on_sent))
        self.connection.call_ended(self)
        return True

    def _end(self) -> None:
        self.ended = True
        self.client_open = False
        self._on_cancel = self.on_message = self.on_half_close = None
        self._calls.active.pop(self.stream_id, None)

    def run(self, handler: Callable[..., None], *args: Any) -> None:
        """Call `handler`. What it raises is the answer: one fault ends neither other calls nor the connection."""
        try:
            handler(*args)
        except RemoraError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - the border of a call: reported, and answered
            self.fail(InternalError(f"{self.service}/{self.method}: internal error", fix="see the server's log"))
            self.connection.report(error)

    def _cancel(self, reason: RemoraError) -> None:
        """End the call without an answer; the connection's transport has sent one, or can't."""
        callback = self._on_cancel
        self._end()
        if callback is not None:
            self.run(callback, reason)
        self.release()
        self.connection.call_ended(self)

    # -- the request's memory ---------------------------------------------------------------------------------------

    def retain(self) -> None:
        """Keep the payload's block until `release`, beyond the end of the call."""
        self._holders += 1

    def adopt(self, release: Callable[[], None]) -> None:
        """Keep other memory as long as the payload's block, such as that of a streamed message (`on_message`)."""
        if self._holders <= 0:
            release()
        elif self._adopted is None:
            self._adopted = [release]
        else:
            self._adopted.append(release)

    def release(self) -> None:
        """Give up what `retain` asked for."""
        self._holders -= 1
        if self._holders == 0:
            block, self._block = self._block, None
            if block is not None:
                block.release()
            adopted, self._adopted = self._adopted, None
            for release in adopted or ():
                release()

    def _sent_then(self, on_sent: Callable[[], None]) -> Callable[[], None]:
        def sent() -> None:
            self.release()
            on_sent()

        return sent


class Calls:
    """The open calls of one connection."""

    __slots__ = ("connection", "active", "_last_id", "_clock")

    def __init__(self, connection: Transport, clock: Callable[[], float] = time.monotonic) -> None:
        self.connection = connection
        self.active: Dict[int, Call] = {}
        self._last_id = 0
        self._clock = clock

    def received(self, frame: Frame) -> Optional[Call]:
        """Take a frame; return the call it opens. What the peer did wrong on one stream is answered there."""
        stream_id, kind, flags, body, block = frame
        if kind == REQUEST:
            refusal = self._refusal(stream_id, body)
            if refusal is None:
                try:
                    return self._open(stream_id, flags, body, block)  # type: ignore[arg-type]  # no error: not refused
                except DecodeError as error:
                    refusal = error
            self.connection.transmit(error_frame(stream_id, refusal))
            _release(block)
            self.connection.refused(refusal)
        elif kind == DATA:
            self._message(stream_id, flags, body, block)
        else:
            _release(block)
            raise ProtocolError(f"the client sent a response on stream {stream_id}; only servers do")
        return None

    def cancel_all(self, reason: RemoraError) -> None:
        """End all calls: nobody is left to answer."""
        for call in list(self.active.values()):
            call._cancel(reason)

    def expire(self) -> Optional[float]:
        """Answer the calls whose deadline has passed; return the next deadline, None for none."""
        now_s = self._clock()
        next_s = None
        for call in list(self.active.values()):
            if call.deadline_s is None:
                continue
            if call.deadline_s <= now_s:
                error = DeadlineExceededError(f"{call.service}/{call.method}: the deadline passed before the answer")
                self.connection.transmit(error_frame(call.stream_id, error))
                if call._on_cancel is None:  # its handler will not know
                    self.connection.refused(error)
                call._cancel(error)
            elif next_s is None or call.deadline_s < next_s:
                next_s = call.deadline_s
        return next_s

    def _refusal(self, stream_id: int, body: Union[Piece, RemoraError]) -> Optional[RemoraError]:
        """Return why a request is not accepted. The first two rules are containerd's (server.go)."""
        if not stream_id & 1:
            return InvalidArgumentError(f"stream id {stream_id} is even; a client's ids are odd")
        if stream_id <= self._last_id:
            return InvalidArgumentError(f"stream id {stream_id} does not exceed {self._last_id}; ids must grow")
        self._last_id = stream_id
        return body if isinstance(body, RemoraError) else None

    def _open(self, stream_id: int, flags: int, body: Piece, block: Optional[Block]) -> Call:
        names, payload, timeout_nano, metadata = _parse(body)
        call = Call(self, stream_id, names, payload, metadata, block, bool(flags & REMOTE_OPEN))
        if timeout_nano > 0:
            call.deadline_s = self._clock() + timeout_nano / 1e9
        self.active[stream_id] = call
        return call

    def _message(self, stream_id: int, flags: int, body: Union[Piece, RemoraError], block: Optional[Block]) -> None:
        release = _nothing if block is None else block.release
        call = self.active.get(stream_id)
        if call is None:
            # Answered already while the client was still sending: no fault of its own, and it has its answer.
            release()
            return
        fault = _message_fault(call, flags, body)
        if fault is not None:
            release()
            self.connection.transmit(error_frame(stream_id, fault))
            call._cancel(fault)
            return
        if flags & NO_DATA or call.on_message is None:
            release()
        else:
            call.run(call.on_message, body, release)
        if flags & REMOTE_CLOSED and call.client_open:
            call.client_open = False
            if call.on_half_close is not None:
                call.run(call.on_half_close)


def _message_fault(call: Call, flags: int, body: Union[Piece, RemoraError]) -> Optional[RemoraError]:
    if isinstance(body, RemoraError):
        return body
    if not call.client_open:
        return InvalidArgumentError(f"data on stream {call.stream_id}, which the client has closed or never opened")
    if flags & NO_DATA and body:
        return InvalidArgumentError(f"a frame of stream {call.stream_id} is marked as empty but has {len(body)} bytes")
    return None


def _nothing() -> None:
    """Give back the memory of a small message: there is nothing to do."""


def _release(block: Optional[Block]) -> None:
    if block is not None:
        block.release()


def _only_timeout(body: Piece, pos: int, size: int) -> int:
    """Return timeout_nano if it is all that follows `pos`, else 0: nearly every request ends with it."""
    if body[pos] != 0x20 or size - pos > _LONGEST_TIMEOUT:
        return 0
    tail = bytes(body[pos:size])
    known = _timeouts.get(tail)
    if known is not None:
        return known
    try:
        value, pos = read_varint(body, pos + 1)
    except IndexError as error:
        raise DecodeError("Request: the message ends in the middle of a field") from error
    value = value if pos == size and value < 1 << 63 else 0
    if value and len(_timeouts) < _MAX_CACHED:
        _timeouts[tail] = value
    return value


def _parse(body: Piece) -> Tuple[Tuple[str, str], Piece, int, Sequence[KeyValue]]:
    """Return ((service, method), payload, timeout_nano, metadata).

    Almost all requests of a peer start with the same few strings, so their bytes are looked up, not decoded.
    """
    size = len(body)
    if size > 4 and body[0] == 0x0A:
        stop = 2 + body[1]
        if body[1] < 128 and stop + 1 < size and body[stop] == 0x12 and body[stop + 1] < 128:
            stop += 2 + body[stop + 1]
            names = _known.get(bytes(body[:stop]))
            if names is not None:
                if stop == size:
                    return names, b"", 0, ()
                if body[stop] == 0x1A:
                    try:
                        start, end = read_length(body, stop + 1, size)
                    except IndexError as error:
                        raise DecodeError("Request: the message ends in the middle of a field") from error
                    if end == size:
                        return names, body[start:], 0, ()
                    timeout_nano = _only_timeout(body, end, size)
                    if timeout_nano:
                        return names, body[start:end], timeout_nano, ()
    request = Request.decode(body, limits=ENVELOPE_LIMITS)
    names = request.service, request.method
    if len(_known) < _MAX_CACHED and len(request.service) + len(request.method) < 120:
        _known[Request(service=names[0], method=names[1]).to_bytes()] = names
    return names, request.payload, request.timeout_nano, request.metadata
