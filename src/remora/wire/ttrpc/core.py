"""The client's half of ttrpc without I/O: envelopes, stream ids, and what each stream has received.

The sync and the asyncio client are shells around `Streams`. Envelopes of plain unary calls are put together and taken
apart by hand, with what repeats from call to call kept ready: a third of a small call's time otherwise. Everything
unusual (metadata, details, unknown fields) goes through the codec.
"""

from __future__ import annotations

from collections import deque

from remora.errors import ProtocolError, RemoraError, ResourceExhaustedError, UnavailableError
from remora.wire.protobuf import Message
from remora.wire.protobuf_kinds import varint
from remora.wire.ttrpc.frames import DATA, HEADER, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE
from remora.wire.ttrpc.messages import ENVELOPE_LIMITS, KeyValue, Request, Response, error_of, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple, Union

    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.frames import Block, Frame

    Metadata = Mapping[str, Union[str, Sequence[str]]]
    Body = Union[Message, Sequence[Piece]]

#: Bytes a client holds of a stream whose messages nobody takes; beyond them the stream fails.
MAX_UNREAD_BYTES = 64 << 20
#: Prefixes kept ready. Names come from code, not from peers; the bound is for those who make names up.
_MAX_CACHED = 1024

_LAST_STREAM_ID = (1 << 31) - 1
#: Field 4 of `Request`, a varint: by hand, because nearly every call has a deadline.
_TIMEOUT_KEY = b"\x20"
_prefixes: Dict[Tuple[str, str], bytes] = {}
_timeouts: Dict[int, bytes] = {}


# -- frames to send ---------------------------------------------------------------------------------------------------


def _pieces(body: Body) -> List[Piece]:
    """Return [room for the head, the body's pieces...]."""
    out: List[Piece] = [b""]
    if isinstance(body, Message):
        body.encode_to(out)
    else:
        out.extend(body)
    return out


def _prefix(service: str, method: str) -> bytes:
    prefix = Request(service=service, method=method).to_bytes() + b"\x1a"
    if len(_prefixes) < _MAX_CACHED:
        _prefixes[service, method] = prefix
    return prefix


def request_frame(
    stream_id: int,
    service: str,
    method: str,
    body: Optional[Body],
    *,
    flags: int = 0,
    timeout_s: Optional[float] = None,
    metadata: Optional[Metadata] = None,
) -> List[Piece]:
    """Return the pieces of a request frame; many of them may be tiny (`protobuf.gather`)."""
    out: List[Piece] = [b""] if body is None else _pieces(body)
    size = sum(map(len, out))
    prefix = (_prefixes.get((service, method)) or _prefix(service, method)) + varint(size)
    if timeout_s is not None or metadata:
        tail = b"" if timeout_s is None else _timeout(timeout_s)
        if metadata:
            tail += Request(metadata=_pairs(metadata)).to_bytes()
        out.append(tail)
        size += len(tail)
    out[0] = HEADER.pack(len(prefix) + size, stream_id, REQUEST, flags) + prefix
    return out


def _timeout(timeout_s: float) -> bytes:
    """Return the field `timeout_nano`. From a second on in whole milliseconds, so that both ends know the bytes."""
    if timeout_s < 1:
        return _TIMEOUT_KEY + varint(max(1, int(timeout_s * 1e9)))
    timeout_ms = int(timeout_s * 1e3)
    known = _timeouts.get(timeout_ms)
    if known is None:
        known = _TIMEOUT_KEY + varint(timeout_ms * 1_000_000)
        if len(_timeouts) < _MAX_CACHED:
            _timeouts[timeout_ms] = known
    return known


def _pairs(metadata: Optional[Metadata]) -> List[KeyValue]:
    pairs = []
    for key, values in (metadata or {}).items():
        for value in (values,) if isinstance(values, str) else values:
            pairs.append(KeyValue(key=key, value=value))
    return pairs


def response_frame(stream_id: int, body: Body) -> List[Piece]:
    """Return the pieces of a success. Its status is present and empty, as the Rust implementation sends it."""
    out = _pieces(body)
    size = sum(map(len, out))
    prefix = b"\x0a\x00\x12" + varint(size) if size else b"\x0a\x00"
    out[0] = HEADER.pack(len(prefix) + size, stream_id, RESPONSE, 0) + prefix
    return out


def error_frame(stream_id: int, error: RemoraError, details: Sequence[Any] = ()) -> List[Piece]:
    out = _pieces(Response(status=status_of(error, details)))
    out[0] = HEADER.pack(sum(map(len, out)), stream_id, RESPONSE, 0)
    return out


def data_frame(stream_id: int, body: Optional[Body], flags: int = 0) -> List[Piece]:
    """Return the pieces of a message of a stream, bare; None with NO_DATA for none."""
    out: List[Piece] = [b""] if body is None else _pieces(body)
    out[0] = HEADER.pack(sum(map(len, out)), stream_id, DATA, flags)
    return out


# -- frames received --------------------------------------------------------------------------------------------------


def response_payload(body: Piece) -> Piece:
    """Return the payload of a response envelope.

    Raises:
        RemoraError: the status of a failed call.
        DecodeError: the envelope is malformed.
    """
    size = len(body)
    start = 2 if size >= 2 and body[0] == 0x0A and body[1] == 0 else 0
    if start == size and start:
        return b""
    if size > start + 1 and body[start] == 0x12:
        length = body[start + 1]
        if length < 128 and start + 2 + length == size:
            return body[start + 2 :]
    response = Response.decode(body, limits=ENVELOPE_LIMITS)
    if response.status is not None and response.status.code:
        raise error_of(response.status)
    return response.payload


class ClientStream:
    """What one call has received. `take` returns the next message, or raises what ended the stream."""

    __slots__ = ("id", "server_streaming", "client_open", "done", "error", "unread_bytes", "on_news", "_inbox")

    def __init__(self, stream_id: int, server_streaming: bool, client_open: bool) -> None:
        self.id = stream_id
        self.server_streaming = server_streaming
        #: This end may still send.
        self.client_open = client_open
        #: Nothing more will come.
        self.done = False
        self.error: Optional[RemoraError] = None
        self.unread_bytes = 0
        #: Called when something has come.
        self.on_news: Optional[Callable[[], object]] = None
        self._inbox: Deque[Tuple[Piece, Optional[Block]]] = deque()

    @property
    def ready(self) -> bool:
        """True if `take` has an answer."""
        return self.done or bool(self._inbox)

    def take(self) -> Optional[Piece]:
        """Return the next message, None at the end of the stream; only call it when `ready`."""
        if self._inbox:
            body = self._inbox.popleft()[0]
            self.unread_bytes -= len(body)
            return body
        if self.error is not None:
            raise self.error
        return None

    def _put(self, body: Piece, block: Optional[Block]) -> None:
        self._inbox.append((body, block))
        self.unread_bytes += len(body)

    def _finish(self, error: Optional[RemoraError] = None) -> None:
        self.done = True
        self.client_open = False
        self.error = error


class Streams:
    """The streams of one client connection: hands out ids and sorts what comes in."""

    __slots__ = ("active", "closed", "_next_id", "_max_unread_bytes")

    def __init__(self, max_unread_bytes: int = MAX_UNREAD_BYTES) -> None:
        self.active: Dict[int, ClientStream] = {}
        #: Why there is no connection any more.
        self.closed: Optional[RemoraError] = None
        self._next_id = 1
        self._max_unread_bytes = max_unread_bytes

    def open(self, *, server_streaming: bool = False, client_streaming: bool = False) -> ClientStream:
        """Return a new stream. Its request must be the next one that is sent: ids on the wire only grow.

        Raises:
            UnavailableError: the connection is closed, or has used all its ids.
        """
        if self.closed is not None:
            raise type(self.closed)(self.closed.message, fix=self.closed.fix)
        stream_id = self._next_id
        if stream_id > _LAST_STREAM_ID:
            raise UnavailableError("this connection has used all its stream ids", fix="connect again")
        self._next_id = stream_id + 2
        stream = self.active[stream_id] = ClientStream(stream_id, server_streaming, client_streaming)
        return stream

    def forget(self, stream: ClientStream) -> None:
        """Give a stream up; what still comes for it is dropped. ttrpc has no message that tells the server."""
        self.active.pop(stream.id, None)

    def received(self, frame: Frame) -> None:
        """Hand a frame to its stream. Frames of streams that were given up are dropped.

        Raises:
            ProtocolError: a server does not send such a frame.
        """
        stream_id, kind, flags, body, block = frame
        if kind == REQUEST:
            raise ProtocolError(f"the server sent a request on stream {stream_id}")
        stream = self.active.get(stream_id)
        if stream is None:
            if block is not None:
                block.release()
            return
        if isinstance(body, RemoraError):
            self._end(stream, body)
        elif kind == RESPONSE:
            self._response(stream, body, block)
        elif not stream.server_streaming:
            self._end(stream, ProtocolError(f"the server streams on stream {stream_id}, whose call is not streaming"))
        else:
            self._data(stream, flags, body, block)
        if stream.on_news is not None:
            stream.on_news()

    def fail(self, error: RemoraError) -> None:
        """End every stream: the connection is gone."""
        self.closed = error
        streams, self.active = list(self.active.values()), {}
        for stream in streams:
            stream._finish(type(error)(error.message, fix=error.fix))
            if stream.on_news is not None:
                stream.on_news()

    def _end(self, stream: ClientStream, error: Optional[RemoraError] = None) -> None:
        self.active.pop(stream.id, None)
        stream._finish(error)

    def _response(self, stream: ClientStream, body: Piece, block: Optional[Block]) -> None:
        try:
            payload = response_payload(body)
        except RemoraError as error:
            self._end(stream, error)
        else:
            if payload or not stream.server_streaming:
                stream._put(payload, block)
            self._end(stream)

    def _data(self, stream: ClientStream, flags: int, body: Piece, block: Optional[Block]) -> None:
        if not flags & NO_DATA:
            stream._put(body, block)
        if stream.unread_bytes > self._max_unread_bytes:
            error = ResourceExhaustedError(
                f"more than {self._max_unread_bytes} bytes of stream {stream.id} wait to be read", fix="read it faster"
            )
            self._end(stream, error)
        elif flags & REMOTE_CLOSED:
            self._end(stream)


def stream_flags(client_streaming: bool, has_payload: bool) -> int:
    """Return the flags of a streaming call's request."""
    flags = REMOTE_OPEN if client_streaming else REMOTE_CLOSED
    return flags if has_payload else flags | NO_DATA
