"""The state of one stream of the mux: credit in both directions, what waits to be sent, and which halves have ended."""

from __future__ import annotations

from collections import deque

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
