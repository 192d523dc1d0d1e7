"""One gRPC call of an HTTP/2 connection: its request as it comes in, its answer as it goes out, and what both hold.

The connection (`http2`) knows frames, windows and time; nothing of them is here.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from remora.agent.web.exchange import Body, Exchange, Piece
from remora.errors import RemoraError
from remora.workers.contract import Block

#: Before each message: whether it is compressed, and its size.
PREFIX = struct.Struct(">BI")


class Answers(Protocol):
    """The connection as a call answers on it."""

    def answer(self, stream: Stream, pieces: Sequence[Piece], on_sent: Callable[[], None]) -> None: ...

    def tell(self, stream: Stream, pieces: Sequence[Piece]) -> bool: ...

    def refuse(self, stream: Stream, error: RemoraError) -> None: ...


class GrpcExchange(Exchange):
    """A gRPC call with one request; `path` is `/service/Method`. It has one answer, or a stream of them by `tell`."""

    __slots__ = ("_connection", "_stream", "path")

    def __init__(self, connection: Answers, stream: Stream, body: memoryview, block: Block | None) -> None:
        super().__init__(stream.headers, body, block)
        self._connection = connection
        self._stream = stream
        self.path = stream.headers.get(":path", "")

    def respond(self, pieces: Sequence[Piece], *, on_sent: Callable[[], None] | None = None) -> bool:
        """Answer with a message. Returns False if the call was over; `on_sent` is called in any case, once."""
        sent = self._answering(on_sent)
        if sent is None:
            return False
        self._connection.answer(self._stream, pieces, sent)
        return True

    def tell(self, pieces: Sequence[Piece]) -> bool:
        """Send a message of a stream of them, which the client ends, or `fail`.

        Returns False if the client has not taken the one before yet: this one is not sent then.
        """
        return not self.ended and self._connection.tell(self._stream, pieces)

    def fail(self, error: RemoraError) -> bool:
        """Answer with a status. Returns False if the call was over already."""
        if self.ended:
            return False
        self._end()
        self._connection.refuse(self._stream, error)
        self.release()
        return True


class Stream:
    """One call on its way in or out."""

    __slots__ = ("begun_s", "body", "exchange", "headers", "id", "on_sent", "out", "prefix", "sending", "several")

    def __init__(self, stream_id: int, headers: dict[str, str], now_s: float) -> None:
        self.id = stream_id
        self.headers = headers
        #: When its request began to come, or its answer to wait for the client; 0 while it is being worked on.
        self.begun_s = now_s
        self.prefix = b""
        self.body: Body | None = None
        self.exchange: GrpcExchange | None = None
        #: What the client's windows do not let through yet.
        self.out: deque[memoryview] = deque()
        #: Its answer is a stream of messages, and has begun.
        self.several = False
        #: Frames that the socket has not taken yet.
        self.sending = 0
        self.on_sent: Callable[[], None] | None = None

    def queue(self, pieces: Sequence[Piece]) -> None:
        """Have a message sent after what is queued already."""
        self.out.append(memoryview(PREFIX.pack(0, sum(map(len, pieces)))))
        self.out.extend(memoryview(piece) for piece in pieces if len(piece))

    def settle(self) -> None:
        """Give the answer's memory back if nothing of it is left to send."""
        if not self.out and not self.sending:
            on_sent, self.on_sent = self.on_sent, None
            if on_sent is not None:
                on_sent()

    def drop(self, reason: RemoraError) -> None:
        """Give back what a stream that is gone holds."""
        if self.body is not None:
            self.body.drop()
            self.body = None
        self.out.clear()
        self.settle()
        if self.exchange is not None:
            self.exchange.cancel(reason)


def take(out: deque[memoryview], room: int) -> tuple[int, list[memoryview]]:
    """Take up to `room` bytes off a queue of buffers; return how many, and them."""
    size, taken = 0, []
    while out and size < room:
        piece = out.popleft()
        if len(piece) > room - size:
            out.appendleft(piece[room - size :])
            piece = piece[: room - size]
        size += len(piece)
        taken.append(piece)
    return size, taken
