"""gRPC's requests over HTTP/2: h2 keeps the protocol's state, this keeps memory, time and flow within bounds.

h2 is sans-I/O and decides what is legal; it was chosen over grpcio's server, which brings threads of its own and copies
every message (docs/decisions/). Data goes around it in both directions (`http2_frames`): in, to the block where a
message will stay, which its five-byte prefix sizes before anything is allocated; out, from the memory of the answer.
Calls have one request, and one answer but for those who watch something.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from h2 import events as h2_events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from remora.agent.web import grpc, http2_frames
from remora.agent.web.exchange import Allocate, Body, Link, Piece
from remora.agent.web.http2_frames import MAX_FRAME_BYTES, PREFACE, FrameReader
from remora.agent.web.http2_streams import PREFIX, GrpcExchange, Stream, take
from remora.errors import (
    CancelledError,
    InvalidArgumentError,
    ProtocolError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)

_WINDOW_UPDATE = 8
_MAX_HEADERS_BYTES = 16384
_MAX_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW = 65535
#: Credit is given back in steps of this size.
_CREDIT_BYTES = 1 << 20
#: Frames that carry no request and no data (pings, settings, resets, window updates, empty ones): so many are free,
#: and so many more for each call, KiB and second. Each costs the agent 30 us for its 9 bytes (CVE-2019-9512 ff.,
#: CVE-2023-44487).
_FREE_FRAMES = 1000
_FRAMES_PER_CALL = 20
_FRAMES_PER_S = 20
_SLOWEST_BYTES_PER_S = 65536
_CHECK_S = 1.0


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
        limit_name: str = "limits.message_bytes",
        max_streams: int,
        timeout_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._link = link
        self._handler = handler
        self._allocate = allocate
        self._max_body_bytes, self._limit_name = max_body_bytes, limit_name
        self._timeout_s = timeout_s
        self._now_s = now_s
        #: Streams that have no whole answer yet.
        self._streams: dict[int, Stream] = {}
        self._frames = self._calls = self._kib = 0
        self._uncredited = 0
        self._over = False
        self._leaving = False
        self._settled = False
        self._opened_s = now_s()
        self._reader = FrameReader(self, scratch, len(PREFACE))
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
                SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADERS_BYTES,
                # Memory is bounded by message, not by window: each has its block before its bytes are let in.
                SettingCodes.INITIAL_WINDOW_SIZE: min(self._max_body_bytes + _DEFAULT_WINDOW, _MAX_WINDOW),
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_MAX_WINDOW - _DEFAULT_WINDOW)
        self._flush()

    # -- receiving --------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        return self._reader.get_buffer()

    def received(self, count: int) -> None:
        if self._over:
            return
        try:
            self._reader.received(count)
        except (H2Error, ProtocolError, ValueError) as error:
            self._goodbye(ErrorCodes.PROTOCOL_ERROR)
            self._link.finish()
            raise ProtocolError(f"the client does not speak HTTP/2 as it should: {error}") from error
        self._flush()

    def control(self, frame: bytes) -> None:
        """(`http2_frames.Sink`)"""
        if self._over:
            return
        if self._too_many_frames():
            return
        for event in self._h2.receive_data(frame):
            self._event(event)

    def data(self, stream: int, payload: memoryview) -> None:
        """(`http2_frames.Sink`)"""
        found = self._streams.get(stream)
        if found is not None and found.exchange is None:
            self._message_data(found, payload)

    def data_ended(self, stream: int, size: int, *, end_stream: bool) -> None:
        """(`http2_frames.Sink`)"""
        if self._over:
            return
        self._kib += size >> 10
        self._uncredited += size
        if self._uncredited >= _CREDIT_BYTES:
            credit, self._uncredited = self._uncredited, 0
            frame = http2_frames.header(4, _WINDOW_UPDATE, 0, 0) + struct.pack(">I", credit)
            self._flush()
            self._link.transmit([frame])
        if not size and self._too_many_frames():
            return
        if end_stream or stream not in self._streams:
            # That the stream ends, or does not exist, is h2's business; its bytes are not.
            flags = http2_frames.END_STREAM if end_stream else 0
            for event in self._h2.receive_data(http2_frames.header(0, http2_frames.DATA, flags, stream)):
                self._event(event)

    def body_of(self, stream: int) -> Body | None:
        """(`http2_frames.Sink`)"""
        found = self._streams.get(stream)
        return found.body if found is not None and found.exchange is None else None

    def _too_many_frames(self) -> bool:
        """Count a frame that carries nothing; end the connection if it has sent too many of them."""
        self._frames += 1
        allowed = _FREE_FRAMES + self._calls * _FRAMES_PER_CALL + self._kib
        if self._frames <= _FREE_FRAMES or self._frames <= (allowed + (self._now_s() - self._opened_s) * _FRAMES_PER_S):
            return False
        self._goodbye(ErrorCodes.ENHANCE_YOUR_CALM)
        self._link.finish()
        return True

    def _event(self, event: Any) -> None:
        # Any: h2's events have no common base with what is used here.
        if self._over:
            return
        if isinstance(event, h2_events.RequestReceived):
            self._open(event.stream_id, event.headers)
        elif isinstance(event, h2_events.StreamEnded):
            stream = self._streams.get(event.stream_id)
            if stream is not None and stream.exchange is None:
                self._complete(stream)
        elif isinstance(event, h2_events.StreamReset):
            stream = self._streams.pop(event.stream_id, None)
            if stream is not None:
                stream.drop(CancelledError("the client gave the call up"))
        elif isinstance(event, h2_events.WindowUpdated | h2_events.RemoteSettingsChanged):
            self._settled = True
            for stream in list(self._streams.values()):
                if stream.out:
                    self._pump(stream)
        elif isinstance(event, h2_events.ConnectionTerminated) and not self._streams:
            self._over = True
            self._link.finish()

    def _open(self, stream_id: int, raw: Iterable[tuple[bytes, bytes]]) -> None:
        if self._leaving:  # above the last stream of our GOAWAY: the client knows that it may send it elsewhere
            self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        headers = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in raw}
        stream = self._streams[stream_id] = Stream(stream_id, headers, self._now_s())
        status = grpc.unacceptable(headers)
        if status:
            # No gRPC at all: told in HTTP's terms (gRPC over HTTP2, "Appendix: HTTP2 details").
            self._h2.send_headers(stream_id, [(":status", str(status))], end_stream=True)
            self._answered(stream)
            return
        encoding = headers.get("grpc-encoding", "identity")
        if encoding != "identity":
            error = UnimplementedError(
                f"messages compressed with {encoding[:40]!r} are not accepted", fix="send them uncompressed"
            )
            self._turn_away(stream, error)

    def _message_data(self, stream: Stream, rest: memoryview) -> None:
        if stream.body is None:
            missing = PREFIX.size - len(stream.prefix)
            stream.prefix += bytes(rest[:missing])
            rest = rest[missing:]
            if len(stream.prefix) < PREFIX.size:
                return
            compressed, size = PREFIX.unpack(stream.prefix)
            try:
                stream.body = self._body(compressed, size)
            except RemoraError as error:
                self._turn_away(stream, error)
                return
        if stream.body.put(rest) < len(rest):
            self._turn_away(
                stream, InvalidArgumentError("a unary call has one message, and more bytes than it were sent")
            )

    def _body(self, compressed: int, size: int) -> Body:
        if compressed:
            raise UnimplementedError("compressed messages are not accepted", fix="send them uncompressed")
        if size > self._max_body_bytes:
            raise ResourceExhaustedError(
                f"a message of {size} bytes was sent, {self._max_body_bytes} are allowed ({self._limit_name})",
                fix="send less at once, or ask the operator to raise it",
            )
        return Body(size, self._allocate)

    def _complete(self, stream: Stream) -> None:
        body = stream.body
        if body is None or not body.complete:
            self._turn_away(stream, InvalidArgumentError("the call ended before its message was complete"))
            return
        stream.body = None
        stream.begun_s = 0.0
        self._calls += 1
        exchange = stream.exchange = GrpcExchange(self, stream, body.view, body.block)
        try:
            timeout_s = grpc.timeout_s(stream.headers.get("grpc-timeout", ""))
        except RemoraError as error:
            exchange.fail(error)
            return
        if timeout_s is not None:
            exchange.deadline_s = self._now_s() + timeout_s
        self._handler(exchange)

    # -- answering --------------------------------------------------------------------------------------------------

    def answer(self, stream: Stream, pieces: Sequence[Piece], on_sent: Callable[[], None]) -> None:
        """Send a message and the status OK; `on_sent` is called once its memory is no longer needed."""
        if self._over or stream.id not in self._streams:
            on_sent()
            return
        stream.on_sent = on_sent
        stream.queue(pieces)
        self._h2.send_headers(stream.id, grpc.RESPONSE_HEADERS)
        self._pump(stream)
        self._flush()

    def tell(self, stream: Stream, pieces: Sequence[Piece]) -> bool:
        """Send one message of several; False if there is still one before it."""
        if self._over or stream.id not in self._streams or stream.out:
            return False
        if not stream.several:
            stream.several = True
            self._h2.send_headers(stream.id, grpc.RESPONSE_HEADERS)
        stream.queue(pieces)
        self._pump(stream)
        self._flush()
        return True

    def refuse(self, stream: Stream, error: RemoraError) -> None:
        """Send a status without a message, or after the last one."""
        if stream.body is not None:
            stream.body.drop()
            stream.body = None
        if self._over or stream.id not in self._streams:
            return
        if stream.out:  # half a message, which nothing may follow
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
            stream.out.clear()
        else:
            headers = grpc.refusal_trailers(error) if stream.several else grpc.refusal_headers(error)
            self._h2.send_headers(stream.id, headers, end_stream=True)
        self._answered(stream)
        self._flush()

    def _turn_away(self, stream: Stream, error: RemoraError) -> None:
        """Refuse what never became an exchange."""
        self.refuse(stream, error)
        self._link.refused(error)

    def _pump(self, stream: Stream) -> None:
        """Send as much of a stream's answer as the client's windows let through, and the status after its end."""
        connection, out = self._h2, stream.out
        state = connection.streams[stream.id]
        self._flush()  # the headers, before the data that goes around h2
        while out:
            room = min(connection.local_flow_control_window(stream.id), connection.max_outbound_frame_size)
            stream.begun_s = self._now_s()
            if room <= 0:
                return
            size, frame = take(out, room)
            connection.outbound_flow_control_window -= size
            state.outbound_flow_control_window -= size
            self._kib += size >> 10
            stream.sending += 1
            self._link.transmit(
                [http2_frames.header(size, http2_frames.DATA, 0, stream.id), *frame], self._sent(stream)
            )
        if stream.several:
            stream.begun_s = 0.0
            return
        connection.send_headers(stream.id, grpc.OK_TRAILERS, end_stream=True)
        self._answered(stream)
        self._flush()

    @staticmethod
    def _sent(stream: Stream) -> Callable[[], None]:
        def sent() -> None:
            stream.sending -= 1
            stream.settle()

        return sent

    def _answered(self, stream: Stream) -> None:
        """The stream has its whole answer. A client that still sends is told to stop; it is not listened to."""
        self._streams.pop(stream.id, None)
        state = self._h2.streams.get(stream.id)
        if state is not None and not state.closed:
            self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._link.transmit([data])
        if self._leaving and not self._streams and not self._over:
            self._over = True
            self._link.finish()

    def _goodbye(self, code: ErrorCodes) -> None:
        """Tell the client why the connection ends."""
        if not self._over:
            self._over = True
            try:
                self._h2.close_connection(code)
            except H2Error:
                pass  # h2 has said so itself
            self._flush()

    @property
    def unsent_bytes(self) -> int:
        return sum(len(piece) for stream in self._streams.values() for piece in stream.out)

    # -- time and end -----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return any(not stream.several for stream in self._streams.values())

    def leave(self) -> None:
        if self._leaving or self._over:
            return
        # Around h2, which would send nothing more after a GOAWAY of its own (RFC 9113, section 6.8).
        self._leaving = True
        self._link.transmit([http2_frames.goaway(self._h2.highest_inbound_stream_id)])
        for stream in [stream for stream in self._streams.values() if stream.several]:
            ended = UnavailableError("the agent ends: ask the next one")
            self.refuse(stream, ended)
            stream.drop(ended)
        self._flush()

    def check(self, now_s: float) -> float | None:
        """Reset the streams whose request does not come, or whose answer is not taken."""
        if self._over:
            return None
        if not self._settled and now_s > self._opened_s + self._timeout_s:
            self._goodbye(ErrorCodes.SETTINGS_TIMEOUT)
            self._link.finish()
            return None
        for stream in list(self._streams.values()):
            expected = len(stream.body.view) if stream.body is not None else 0
            if stream.begun_s and now_s > stream.begun_s + self._timeout_s + expected / _SLOWEST_BYTES_PER_S:
                del self._streams[stream.id]
                self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
                stream.drop(CancelledError("the call took too long to arrive, or its answer to be taken"))
        self._flush()
        waiting = not self._settled or any(stream.begun_s for stream in self._streams.values())
        return now_s + _CHECK_S if waiting else None

    def closed(self, reason: RemoraError) -> None:
        self._over = True
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.drop(reason)
