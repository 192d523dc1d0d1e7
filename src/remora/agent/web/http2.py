"""gRPC's requests over HTTP/2: h2 keeps the protocol's state, this keeps memory, time and flow within bounds.

h2 is sans-I/O and decides what is legal; it was chosen over grpcio's server, which brings threads of its own and copies
every message (docs/decisions/). Only unary calls exist here. A message is gathered into the block where it will stay:
its five-byte prefix says how large it is before anything is allocated.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from h2 import events as h2_events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from remora.agent.web import grpc
from remora.agent.web.exchange import Allocate, Body, Exchange, Link, Piece
from remora.errors import (
    CancelledError,
    InvalidArgumentError,
    ProtocolError,
    RemoraError,
    ResourceExhaustedError,
    UnimplementedError,
)
from remora.workers.contract import Block

_PREFIX = struct.Struct(">BI")
_MAX_HEADERS_BYTES = 16384
#: The largest frame a client may send: a frame costs h2 about 50 us, so an image model's tensor should be one or two.
_MAX_FRAME_BYTES = 1 << 20
_MAX_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW = 65535
#: Streams that a client may give up before that looks like an attack (CVE-2023-44487), beyond those it let be answered.
_FREE_RESETS = 200
_SLOWEST_BYTES_PER_S = 65536
_CHECK_S = 1.0


class GrpcExchange(Exchange):
    """A unary gRPC call; `path` is `/service/Method`."""

    __slots__ = ("_connection", "_stream", "path")

    def __init__(
        self, connection: Http2, stream: _Stream, headers: dict[str, str], body: memoryview, block: Block | None
    ) -> None:
        super().__init__(headers, body, block)
        self._connection = connection
        self._stream = stream
        self.path = stream.path

    def respond(self, pieces: Sequence[Piece], *, on_sent: Callable[[], None] | None = None) -> bool:
        """Answer with a message. Returns False if the call was over; `on_sent` is called in any case, once."""
        if self.ended:
            if on_sent is not None:
                on_sent()
            return False
        self._end()

        def sent() -> None:
            self.release()
            if on_sent is not None:
                on_sent()

        self._connection.answer(self._stream, pieces, sent)
        return True

    def fail(self, error: RemoraError) -> bool:
        """Answer with a status. Returns False if the call was over already."""
        if self.ended:
            return False
        self._end()
        self._connection.refuse(self._stream, error)
        self.release()
        return True


class _Stream:
    """One call on its way in or out."""

    __slots__ = ("begun_s", "body", "exchange", "headers", "id", "on_sent", "out", "path", "prefix", "refused")

    def __init__(self, stream_id: int, path: str, headers: dict[str, str], now_s: float) -> None:
        self.id = stream_id
        self.path = path
        self.headers = headers
        #: When its request began to come, or its answer to wait for the client; 0 while it is being worked on.
        self.begun_s = now_s
        self.prefix = b""
        self.body: Body | None = None
        #: It has its answer already: what still comes is thrown away.
        self.refused = False
        self.exchange: GrpcExchange | None = None
        self.out: deque[memoryview] = deque()
        self.on_sent: Callable[[], None] | None = None


class Http2:
    """One HTTP/2 connection (`exchange.Speaker`). See `Http1` for the arguments; `max_streams` are open at once."""

    def __init__(
        self,
        link: Link,
        handler: Callable[[GrpcExchange], None],
        *,
        scratch: memoryview,
        allocate: Allocate,
        max_body_bytes: int,
        max_streams: int,
        timeout_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._link = link
        self._handler = handler
        self._scratch = scratch
        self._allocate = allocate
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._streams: dict[int, _Stream] = {}
        self._resets = 0
        self._answered = 0
        self._over = False
        self._settled = False
        self._opened_s = now_s()
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
                SettingCodes.MAX_FRAME_SIZE: _MAX_FRAME_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADERS_BYTES,
                SettingCodes.INITIAL_WINDOW_SIZE: min(max_body_bytes + _DEFAULT_WINDOW, _MAX_WINDOW),
            },
        )
        self._h2.max_inbound_frame_size = _MAX_FRAME_BYTES
        self._h2.initiate_connection()
        # Memory is bounded by message, not by window: each message has its block before its bytes are let in.
        self._h2.increment_flow_control_window(_MAX_WINDOW - _DEFAULT_WINDOW)
        self._flush()

    # -- receiving --------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        return self._scratch

    def received(self, count: int) -> None:
        if self._over:
            return
        try:
            for event in self._h2.receive_data(bytes(self._scratch[:count])):
                self._event(event)
        except (H2Error, UnicodeDecodeError, ValueError) as error:
            self._over = True
            self._flush()  # h2 has said goodbye to the client
            raise ProtocolError(f"the client does not speak HTTP/2 as it should: {error}") from error
        self._flush()

    def _event(self, event: Any) -> None:
        # Any: h2's events have no common base with what is used here.
        if self._over:
            return
        if isinstance(event, h2_events.DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            stream = self._streams.get(event.stream_id)
            if stream is not None and not stream.refused:
                self._data(stream, event.data)
        elif isinstance(event, h2_events.RequestReceived):
            self._open(event.stream_id, event.headers)
        elif isinstance(event, h2_events.StreamEnded):
            stream = self._streams.get(event.stream_id)
            if stream is not None and not stream.refused:
                self._complete(stream)
        elif isinstance(event, h2_events.StreamReset):
            self._reset(event.stream_id)
        elif isinstance(event, h2_events.WindowUpdated | h2_events.RemoteSettingsChanged):
            self._settled = True
            for stream in list(self._streams.values()):
                if stream.out:
                    self._pump(stream)
        elif isinstance(event, h2_events.ConnectionTerminated) and not self._streams:
            self._end()

    def _open(self, stream_id: int, raw: Iterable[tuple[bytes, bytes]]) -> None:
        headers = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in raw}
        stream = _Stream(stream_id, headers.get(":path", ""), headers, self._now_s())
        self._streams[stream_id] = stream
        status = grpc.unacceptable(headers)
        if status:
            # No gRPC at all: told in HTTP's terms (gRPC over HTTP2, "Appendix: HTTP2 details").
            stream.refused = True
            self._h2.send_headers(stream_id, [(":status", str(status))], end_stream=True)
            self._answered_stream(stream)
            return
        encoding = headers.get("grpc-encoding", "identity")
        if encoding != "identity":
            error = UnimplementedError(
                f"messages compressed with {encoding[:40]!r} are not accepted", fix="send them uncompressed"
            )
            self.refuse(stream, error)

    def _data(self, stream: _Stream, data: bytes) -> None:
        rest = memoryview(data)
        if stream.body is None:
            missing = _PREFIX.size - len(stream.prefix)
            stream.prefix += bytes(rest[:missing])
            rest = rest[missing:]
            if len(stream.prefix) < _PREFIX.size:
                return
            compressed, size = _PREFIX.unpack(stream.prefix)
            try:
                stream.body = self._body(compressed, size)
            except RemoraError as error:
                self.refuse(stream, error)
                return
        if stream.body.put(rest) < len(rest):
            self.refuse(stream, InvalidArgumentError("a unary call has one message, and more bytes than it were sent"))

    def _body(self, compressed: int, size: int) -> Body:
        if compressed:
            raise UnimplementedError("compressed messages are not accepted", fix="send them uncompressed")
        if size > self._max_body_bytes:
            raise ResourceExhaustedError(
                f"a message of {size} bytes was sent, {self._max_body_bytes} are allowed (limits.message_bytes)",
                fix="send less at once, or ask the operator to raise it",
            )
        return Body(size, self._allocate)

    def _complete(self, stream: _Stream) -> None:
        body = stream.body
        if body is None or not body.complete:
            self.refuse(stream, InvalidArgumentError("the call ended before its message was complete"))
            return
        stream.body = None
        stream.begun_s = 0.0
        exchange = stream.exchange = GrpcExchange(self, stream, stream.headers, body.view, body.block)
        try:
            timeout_s = grpc.timeout_s(stream.headers.get("grpc-timeout", ""))
        except RemoraError as error:
            exchange.fail(error)
            return
        if timeout_s is not None:
            exchange.deadline_s = self._now_s() + timeout_s
        self._handler(exchange)

    def _reset(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        self._drop(stream, CancelledError("the client gave the call up"))
        self._resets += 1
        if self._resets > _FREE_RESETS + self._answered:
            self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._end()

    def _drop(self, stream: _Stream, reason: RemoraError) -> None:
        """Give back what a stream that is gone held."""
        if stream.body is not None:
            stream.body.drop()
            stream.body = None
        stream.out.clear()
        self._sent(stream)
        if stream.exchange is not None:
            stream.exchange.cancel(reason)

    # -- answering --------------------------------------------------------------------------------------------------

    def answer(self, stream: _Stream, pieces: Sequence[Piece], on_sent: Callable[[], None]) -> None:
        """Send a message and the status OK; `on_sent` is called once its memory is no longer needed."""
        if self._over or stream.id not in self._streams:
            on_sent()
            return
        stream.on_sent = on_sent
        stream.begun_s = self._now_s()
        prefix = _PREFIX.pack(0, sum(map(len, pieces)))
        first, *rest = pieces or (b"",)
        if len(first) < 4096:
            stream.out.append(memoryview(prefix + bytes(first)))
        else:
            stream.out.extend((memoryview(prefix), memoryview(first)))
        stream.out.extend(memoryview(piece) for piece in rest)
        self._h2.send_headers(stream.id, grpc.RESPONSE_HEADERS)
        self._pump(stream)
        self._flush()

    def refuse(self, stream: _Stream, error: RemoraError) -> None:
        """Send a status without a message."""
        if stream.body is not None:
            stream.body.drop()
            stream.body = None
        if self._over or stream.id not in self._streams or stream.refused:
            return
        stream.refused = True
        self._h2.send_headers(stream.id, grpc.refusal_headers(error), end_stream=True)
        self._answered_stream(stream)
        self._flush()

    def _pump(self, stream: _Stream) -> None:
        """Send as much of a stream's answer as the client's windows let through."""
        connection, out = self._h2, stream.out
        while out:
            room = min(connection.local_flow_control_window(stream.id), connection.max_outbound_frame_size)
            if room <= 0:
                return
            piece = out.popleft()
            if len(piece) > room:
                out.appendleft(piece[room:])
                piece = piece[:room]
            connection.send_data(stream.id, piece)
            stream.begun_s = self._now_s()
        connection.send_headers(stream.id, grpc.OK_TRAILERS, end_stream=True)
        self._sent(stream)
        self._answered_stream(stream)

    def _sent(self, stream: _Stream) -> None:
        on_sent, stream.on_sent = stream.on_sent, None
        if on_sent is not None:
            on_sent()

    def _answered_stream(self, stream: _Stream) -> None:
        """The stream has its whole answer. A client that still sends is told to stop; it need not be listened to."""
        self._answered += 1
        self._streams.pop(stream.id, None)
        state = self._h2.streams.get(stream.id)
        if state is not None and not state.closed:
            self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._link.transmit([data])

    def _end(self) -> None:
        self._over = True
        self._flush()
        self._link.finish()

    # -- time and end -----------------------------------------------------------------------------------------------

    def check(self, now_s: float) -> float | None:
        """Reset the streams whose request does not come, or whose answer is not taken."""
        if self._over:
            return None
        if not self._settled and now_s > self._opened_s + self._timeout_s:
            self._end()
            return None
        for stream in list(self._streams.values()):
            expected = len(stream.body.view) if stream.body is not None else 0
            if stream.begun_s and now_s > stream.begun_s + self._timeout_s + expected / _SLOWEST_BYTES_PER_S:
                del self._streams[stream.id]
                self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
                self._drop(stream, CancelledError("the call took too long to arrive, or its answer to be taken"))
        self._flush()
        waiting = not self._settled or any(stream.begun_s for stream in self._streams.values())
        return now_s + _CHECK_S if waiting else None

    def closed(self, reason: RemoraError) -> None:
        self._over = True
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._drop(stream, reason)
