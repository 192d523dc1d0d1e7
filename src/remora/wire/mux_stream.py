"""One stream of the mux: credit in both directions, what waits to be sent, which halves have ended, and their rules."""

from __future__ import annotations

from collections import deque

from remora.errors import ProtocolError
from remora.wire.mux_frames import MAX_PAYLOAD_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Deque, Union

    Buffer = Union[bytes, memoryview]

#: Credit is given back in steps of this or half a window, whichever is less; a sender's room is never below it.
GRANT_BYTES = 32768
MIN_ROOM_BYTES = 65536
#: Pieces below this share a frame: a frame costs more than the copy.
_COALESCE_BYTES = 32768
_MAX_CREDIT = (1 << 32) - 1


class Stream:
    """What this end knows of one stream."""

    __slots__ = (
        "id",
        "accepted",
        "credit",
        "starved",
        "queue",
        "fin_due",
        "fin_sent",
        "fin_received",
        "allowed",
        "owed",
        "window",
    )

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.accepted = False
        self.credit = 0  # bytes that `send` may still take
        self.starved = False  # `send` has taken less than it was given
        self.queue: Deque[Buffer] = deque()
        self.fin_due = False
        self.fin_sent = False
        self.fin_received = False
        self.allowed = 0  # bytes that the peer may still send
        self.owed = 0  # bytes consumed, not yet given back
        self.window = 0  # bytes that the peer may have under way or unread here

    # -- what the peer does -------------------------------------------------------------------------------------------

    def arrived(self, size: int) -> None:
        """Take note of data.

        Raises:
            ProtocolError: the peer may not send it.
        """
        if not self.accepted or self.fin_received:
            raise ProtocolError(f"mux stream {self.id}: data before it was accepted or after its end")
        if size > self.allowed:
            raise ProtocolError(f"mux stream {self.id}: {size} bytes of data, but only {self.allowed} are allowed")
        self.allowed -= size

    def widened(self, value: int, room_bytes: int) -> bool:
        """Take credit; return whether `put` had taken less than it was given, and may be called again.

        Raises:
            ProtocolError: it is no credit, or more than there can be.
        """
        if value == 0 or self.credit + value > _MAX_CREDIT:
            raise ProtocolError(f"mux stream {self.id}: a window of {value} bytes on top of {self.credit}")
        # A peer may offer more than this end wants to queue; see MIN_ROOM_BYTES for why none is lost that matters.
        self.credit = min(self.credit + value, room_bytes)
        again = self.starved and self.accepted
        if again:
            self.starved = False
        return again

    def ended(self) -> None:
        """Take note of the end of the peer's half.

        Raises:
            ProtocolError: it has ended before, or never began.
        """
        if not self.accepted or self.fin_received:
            raise ProtocolError(f"mux stream {self.id}: ended twice, or before it was accepted")
        self.fin_received = True

    # -- what the owner sends -----------------------------------------------------------------------------------------

    def put(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Queue data as far as there is credit for it; return how many bytes were taken."""
        size = len(data)
        taken = min(size, self.credit)
        if taken < size or not self.accepted:
            self.starved = True
            if not self.accepted:
                return 0
        if taken:
            self.credit -= taken
            whole = taken == size and type(data) is bytes
            self.queue.append(data if whole else bytes(memoryview(data)[:taken]))  # type: ignore[arg-type]  # bytes
        return taken

    def next_payload(self) -> Buffer:
        """Take the payload of one frame from the queue: a large piece in parts, small ones together."""
        queue = self.queue
        first = queue.popleft()
        size = len(first)
        if size > MAX_PAYLOAD_BYTES:
            rest = memoryview(first)
            queue.appendleft(rest[MAX_PAYLOAD_BYTES:])
            return rest[:MAX_PAYLOAD_BYTES]
        if not queue or size >= _COALESCE_BYTES:
            return first
        pieces = [first]
        while queue and size + len(queue[0]) <= MAX_PAYLOAD_BYTES:
            piece = queue.popleft()
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)
