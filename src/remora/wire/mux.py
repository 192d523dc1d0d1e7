"""Many streams over one byte stream: what vsock does, for a virtio-serial port.

QEMU can neither snapshot nor migrate a guest with vhost-user vsock; a virtio-serial port survives both, but it is one
byte stream without connections. This gives it connections: open by port, accept or reject, credit, half-close, reset.
No I/O here: the owner passes received bytes to `receive`, acts on the events, and writes what `outgoing` returns.

Peers find each other by HELLO, which names the sender's epoch and the epoch it knows of the other. Whoever sees a new
epoch, or bytes that are no frame, drops all streams (`Reset` with RESTARTED) and says HELLO again; frames before the
HELLO that knows the current epoch are ignored. So a restored or cloned guest and a new host process meet cleanly
wherever the old stream was cut.

The peer is not trusted. It is bound by credit (`window_bytes` per stream), by `max_streams`, and by a bound on the
answers it makes us queue; whoever breaks a rule with a well-formed frame gets a ProtocolError, and the owner must give
the port up. Frame layout: `mux_frames`.
"""

from __future__ import annotations

import os
from collections import deque

from remora.errors import ProtocolError, ResourceExhaustedError
from remora.wire import mux_frames as frames
from remora.wire.mux_events import (
    ABORTED,
    BUSY,
    REFUSED,
    RESTARTED,
    Accepted,
    Data,
    Event,
    HalfClosed,
    Opened,
    PeerRestarted,
    Rejected,
    Reset,
    Synced,
    Writable,
)
from remora.wire.mux_stream import GRANT_BYTES, MIN_ROOM_BYTES, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Deque, Dict, List, Optional, Union

    Buffer = Union[bytes, memoryview]

__all__ = [
    "ABORTED",
    "BUSY",
    "REFUSED",
    "RESTARTED",
    "Accepted",
    "Data",
    "Event",
    "HalfClosed",
    "Mux",
    "Opened",
    "PeerRestarted",
    "Rejected",
    "Reset",
    "Synced",
    "Writable",
]

#: What all streams that the peer has opened may hold here, in windows, besides the least of each.
_PEER_WINDOWS = 64
_LEAST_WINDOW_BYTES = 16384


class Mux:
    """One end. Streams are named by numbers: odd ones were opened by the initiator.

    Args:
        initiator: True at exactly one end (the host).
        window_bytes: What the peer may send on a stream before `consumed` makes room; less on the further ones of very
            many that it has opened itself.
        max_streams: Streams at once, opened by either end; the peer's surplus is rejected.
        flush: Send padding before the first HELLO, because the peer may wait for the rest of a frame that another
            process began. False only where the peer is new as well (cold boot).
        epoch: For tests; random otherwise.
    """

    def __init__(
        self,
        initiator: bool,
        *,
        window_bytes: int = 262144,
        max_streams: int = 1024,
        flush: Optional[bool] = None,
        epoch: Optional[int] = None,
    ) -> None:
        self._first_id = 1 if initiator else 2
        self._next_id = self._first_id
        self._window_bytes = window_bytes
        self._least_bytes = min(window_bytes, _LEAST_WINDOW_BYTES)
        #: Of the streams that the peer has opened: the windows that they were given.
        self._peer_windows_bytes = 0
        self._room_bytes = max(window_bytes, MIN_ROOM_BYTES)
        self._max_streams = max_streams
        # Each stream may have a few control frames of its own under way; what is beyond comes from a peer that
        # provokes answers without reading them.
        self._max_control = 4 * max_streams + 1024
        self._epoch = epoch or _new_epoch()
        self._peer_epoch = 0
        self._synced = False
        self._used = False  # streams are known to both ends
        self._last_peer_id = 0
        self._streams: Dict[int, Stream] = {}
        self._reader = frames.Reader()
        self._hello_due = True
        self._flush_due = initiator if flush is None else flush
        self._control: Deque[bytes] = deque()
        self._turns: Deque[Stream] = deque()  # streams with something to send, each once
        self._events: List[Event] = []

    @property
    def synced(self) -> bool:
        """True while the peer knows this end's epoch: only then does anything but HELLO flow."""
        return self._synced

    @property
    def streams(self) -> int:
        return len(self._streams)

    @property
    def has_outgoing(self) -> bool:
        return self._hello_due or (self._synced and bool(self._control or self._turns))

    # -- receiving --------------------------------------------------------------------------------------------------

    def receive(self, data: Union[bytes, bytearray, memoryview]) -> List[Event]:
        """Take received bytes; return what has happened, in order. `Data` payloads may be kept as long as wanted.

        Raises:
            ProtocolError: the peer breaks the rules. This mux, and the port, cannot be used any more.
        """
        reader = self._reader
        reader.feed(data)
        while True:
            frame = reader.next()
            if frame is None:
                break
            kind, stream_id, value, payload = frame
            if kind == frames.DATA:
                self._on_data(stream_id, payload)
            elif kind == frames.HELLO:
                self._on_hello(stream_id, value)
            elif kind == frames.GARBAGE:
                self._on_garbage()
            else:
                self._on_control(kind, stream_id, value)
        events, self._events = self._events, []
        return events

    def _on_hello(self, epoch: int, known: int) -> None:
        if epoch != self._peer_epoch:
            if self._peer_epoch:
                self._events.append(PeerRestarted(epoch))
            self._drop_streams()
            self._peer_epoch = epoch
            self._hello_due = True
        if known == self._epoch:
            if not self._synced:
                self._synced = True
                self._events.append(Synced(epoch))
            self._reader.strict = True
            return
        # The peer has not heard of this end yet, or not of its present epoch: nothing it sends is for us.
        self._hello_due = True
        if self._synced:
            self._drop_streams()
        self._reader.strict = False

    def _on_garbage(self) -> None:
        """Bytes were lost: what they were for is unknown, so every stream ends and both ends start anew."""
        self._epoch = _new_epoch()
        self._events.append(PeerRestarted(self._peer_epoch))
        self._drop_streams()
        self._hello_due = True

    def _drop_streams(self) -> None:
        self._synced = False
        self._last_peer_id = 0
        if not self._used:
            return  # streams that were opened before the peer was there still wait for it
        self._used = False
        self._control.clear()
        self._turns.clear()
        streams, self._streams = self._streams, {}
        self._peer_windows_bytes = 0
        self._events.extend(Reset(stream_id, RESTARTED) for stream_id in streams)

    def _on_data(self, stream_id: int, payload: memoryview) -> None:
        stream = self._find(stream_id)
        if stream is None:
            return
        stream.arrived(len(payload))
        self._events.append(Data(stream_id, payload))

    def _on_control(self, kind: int, stream_id: int, value: int) -> None:
        if kind == frames.OPEN:
            self._on_open(stream_id, value)
            return
        stream = self._find(stream_id)
        if stream is None:
            return
        if kind == frames.WINDOW:
            if stream.widened(value, self._room_bytes):
                self._events.append(Writable(stream_id))
        elif kind == frames.ACCEPT or kind == frames.REJECT:
            if stream.accepted or stream_id & 1 != self._first_id & 1:
                raise ProtocolError(f"mux stream {stream_id}: an answer to an OPEN that was not sent or is answered")
            if kind == frames.ACCEPT:
                stream.accepted = True
                self._events.append(Accepted(stream_id))
                self._schedule(stream)
            else:
                self._forget(stream)
                self._events.append(Rejected(stream_id, value))
        elif kind == frames.FIN:
            stream.ended()
            self._events.append(HalfClosed(stream_id))
            self._forget_if_done(stream)
        else:
            self._forget(stream)
            self._events.append(Reset(stream_id, value))

    def _on_open(self, stream_id: int, port: int) -> None:
        if stream_id & 1 == self._first_id & 1 or stream_id <= self._last_peer_id:
            raise ProtocolError(f"mux stream {stream_id}: its number belongs to this end, or does not grow")
        self._last_peer_id = stream_id
        self._used = True
        if len(self._streams) >= self._max_streams:
            self._queue_control(frames.REJECT, stream_id, BUSY)
            return
        self._streams[stream_id] = Stream(stream_id)
        self._events.append(Opened(stream_id, port))

    def _find(self, stream_id: int) -> Optional[Stream]:
        """Return the stream; None if it is over (its peer may not know yet)."""
        stream = self._streams.get(stream_id)
        if stream is None:
            ours = stream_id & 1 == self._first_id & 1
            if stream_id == 0 or (stream_id >= self._next_id if ours else stream_id > self._last_peer_id):
                raise ProtocolError(f"mux stream {stream_id} was never opened")
        return stream

    # -- what the owner does ----------------------------------------------------------------------------------------

    def open(self, port: int) -> int:
        """Return a new stream to the peer's `port`; `Accepted` or `Rejected` follows. Waits for a peer to appear.

        Raises:
            ResourceExhaustedError: `max_streams` are in use.
        """
        if len(self._streams) >= self._max_streams:
            raise ResourceExhaustedError(f"all {self._max_streams} streams of the channel are in use")
        stream = Stream(self._next_id)
        self._next_id += 2
        self._streams[stream.id] = stream
        self._queue_control(frames.OPEN, stream.id, port)
        stream.window = self._window_bytes
        self._grant(stream, stream.window)
        return stream.id

    def accept(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.accepted:
            return  # the peer has reset it meanwhile
        stream.accepted = True
        self._queue_control(frames.ACCEPT, stream_id, 0)
        # A peer that opens streams and fills each holds what its first ones may, and little for any further one.
        room = (_PEER_WINDOWS * self._window_bytes - self._peer_windows_bytes) // 16
        stream.window = max(self._least_bytes, min(self._window_bytes, room))
        self._peer_windows_bytes += stream.window
        self._grant(stream, stream.window)

    def reject(self, stream_id: int, reason: int = REFUSED) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._queue_control(frames.REJECT, stream_id, reason)

    def send(self, stream_id: int, data: Union[bytes, bytearray, memoryview]) -> int:
        """Queue data; return how many bytes were taken. Fewer than given: wait for `Writable`. Never for a dead stream:
        then all is taken and dropped, for its `Reset` is on the way to the owner.

        Data that is not `bytes` is copied, so its buffer may be used again at once.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.fin_due:
            return len(data)
        waits = bool(stream.queue)
        taken = stream.put(data)
        if taken and not waits:
            self._turns.append(stream)
        return taken

    def close_write(self, stream_id: int) -> None:
        """Send no more on this stream; what is queued still goes out."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.fin_due:
            stream.fin_due = True
            self._schedule(stream)

    def reset(self, stream_id: int, reason: int = ABORTED) -> None:
        """Drop the stream in both directions, now."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._queue_control(frames.RESET, stream_id, reason)

    def consumed(self, stream_id: int, count: int) -> None:
        """Tell that `count` received bytes were passed on, so that the peer may send as many again."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.fin_received:
            return
        stream.owed += count
        if stream.owed >= min(GRANT_BYTES, max(1, stream.window // 2)):
            self._grant(stream, stream.owed)
            stream.owed = 0

    def outgoing(self, max_bytes: int = 1 << 18) -> List[Buffer]:
        """Return buffers to write, whole frames, about `max_bytes` at most; empty if there is nothing to send.

        Streams take turns, one frame each, so a large transfer delays a small one by one frame per stream.
        """
        out: List[Buffer] = []
        size = 0
        if self._hello_due:
            self._hello_due = False
            if self._flush_due:
                self._flush_due = False
                out.append(frames.FLUSH)
            out.append(frames.frame(frames.HELLO, self._epoch, self._peer_epoch))
        if not self._synced:
            return out
        control, turns = self._control, self._turns
        if control:
            self._used = True
            out.append(b"".join(control))
            size = len(out[-1])
            control.clear()
        while turns and size < max_bytes:
            self._used = True
            stream = turns.popleft()
            if stream.queue:
                payload = stream.next_payload()
                out.extend(frames.data_frame(stream.id, payload))
                size += frames.HEADER_BYTES + len(payload) + 4
            if stream.queue:
                turns.append(stream)
            elif stream.fin_due and not stream.fin_sent:
                stream.fin_sent = True
                out.append(frames.frame(frames.FIN, stream.id, 0))
                size += frames.HEADER_BYTES
                self._forget_if_done(stream)
        return out

    # -- within -----------------------------------------------------------------------------------------------------

    def _grant(self, stream: Stream, count: int) -> None:
        stream.allowed += count
        self._queue_control(frames.WINDOW, stream.id, count)

    def _queue_control(self, kind: int, stream_id: int, value: int) -> None:
        if len(self._control) >= self._max_control:
            raise ProtocolError(f"the peer reads nothing: {len(self._control)} frames wait for it")
        self._control.append(frames.frame(kind, stream_id, value))

    def _schedule(self, stream: Stream) -> None:
        """Give a stream its turn for a FIN; with data queued it has one."""
        if stream.accepted and stream.fin_due and not stream.fin_sent and not stream.queue:
            self._turns.append(stream)

    def _remove(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is not None and stream.id & 1 != self._first_id & 1:
            self._peer_windows_bytes -= stream.window

    def _forget(self, stream: Stream) -> None:
        self._remove(stream)
        if stream.queue or stream.fin_due:
            stream.queue.clear()
            stream.fin_sent = True
            if stream in self._turns:
                self._turns.remove(stream)

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.fin_sent and stream.fin_received:
            self._remove(stream)


def _new_epoch() -> int:
    return int.from_bytes(os.urandom(4), "big") or 1
