"""One request over HTTP and its answer: what HTTP/1.1 and HTTP/2 have in common for whoever answers.

It is to an HTTP connection what a `Call` is to a ttrpc one, and has the same rules for the request's memory: the body
lies in a block that lives until the answer is sent or the exchange is cancelled, and as long as anyone retains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from remora.errors import RemoraError
from remora.workers.contract import Block

Piece = bytes | memoryview
Allocate = Callable[[int], Block]
#: Bodies from here on get their block from the connection's `allocate`.
ALLOCATE_BYTES = 65536
#: A tensor's first byte should lie on one of these (a cache line).
ALIGN = 64


class Exchange:
    """A request whose body is complete. The protocol's own subclass answers it."""

    __slots__ = ("_block", "_holders", "_on_cancel", "body", "deadline_s", "ended", "headers", "method", "service")

    def __init__(self, headers: Mapping[str, str], body: memoryview, block: Block | None) -> None:
        self.headers = headers
        self.body = body
        #: For the operator: which door and which of its methods. Set by whoever answers.
        self.service = ""
        self.method = ""
        #: On the monotonic clock; None for no deadline.
        self.deadline_s: float | None = None
        #: Answered or cancelled.
        self.ended = False
        self._block = block
        self._holders = 1
        self._on_cancel: Callable[[RemoraError], None] | None = None

    def header(self, name: str) -> str:
        """Return a header by its lower-case name, empty if it is not there."""
        return self.headers.get(name, "")

    def on_cancel(self, callback: Callable[[RemoraError], None]) -> None:
        """Call with the reason when nobody waits for the answer any more."""
        self._on_cancel = callback

    def retain(self) -> None:
        """Keep the body's memory until `release`, beyond the end of the exchange."""
        self._holders += 1

    def release(self) -> None:
        """Give up what `retain` asked for."""
        self._holders -= 1
        if self._holders == 0:
            self.body = memoryview(b"")
            block, self._block = self._block, None
            if block is not None:
                block.release()

    def cancel(self, reason: RemoraError) -> None:
        """End the exchange without an answer: its peer is gone, or gave it up."""
        if self.ended:
            return
        self.ended = True
        callback, self._on_cancel = self._on_cancel, None
        try:
            if callback is not None:
                callback(reason)
        finally:
            self.release()

    def _answering(self, on_sent: Callable[[], None] | None) -> Callable[[], None] | None:
        """End the exchange with an answer; return what is called when that is sent, None if it was over already.

        `on_sent` is called in any case, once.
        """
        if self.ended:
            if on_sent is not None:
                on_sent()
            return None
        self._end()

        def sent() -> None:
            self.release()
            if on_sent is not None:
                on_sent()

        return sent

    def _end(self) -> None:
        self.ended = True
        self._on_cancel = None


class Body:
    """A body on its way in: memory for it, and how much of it is there.

    Args:
        size: Bytes that will come.
        aligned_at: The offset in the body that should lie on a cache line: where the tensors begin.

    Raises:
        RemoraError: there is no room for it.
    """

    __slots__ = ("block", "filled", "view")

    def __init__(self, size: int, allocate: Allocate, aligned_at: int = 0) -> None:
        self.block: Block | None = None
        self.filled = 0
        if size < ALLOCATE_BYTES:
            self.view = memoryview(bytearray(size))
            return
        pad = -aligned_at % ALIGN
        self.block = allocate(size + pad)
        self.view = self.block.view[pad : pad + size]

    @property
    def complete(self) -> bool:
        return self.filled == len(self.view)

    def rest(self) -> memoryview:
        """Return the memory that is still to be filled."""
        return self.view[self.filled :]

    def put(self, data: Piece) -> int:
        """Copy as much of `data` as fits; return how much that was."""
        count = min(len(data), len(self.view) - self.filled)
        self.view[self.filled : self.filled + count] = data[:count]
        self.filled += count
        return count

    def drop(self) -> None:
        """Give the memory of a body that nobody will use back."""
        block, self.block = self.block, None
        self.view = memoryview(b"")
        self.filled = 0
        if block is not None:
            block.release()


class Link(Protocol):
    """The connection as its protocol sees it."""

    def transmit(self, pieces: Sequence[Piece], on_sent: Callable[[], None] | None = None) -> None:
        """Send; `on_sent` is called once the pieces are no longer needed, sent or not."""

    def hold(self, reading: bool) -> None:
        """Read nothing more until told otherwise."""

    def refused(self, error: RemoraError) -> None:
        """Tell the operator of a request that was answered with an error before a handler saw it."""

    def finish(self) -> None:
        """Close once everything is sent, leaving the peer time to read it."""


class Speaker(Protocol):
    """One protocol on one connection, without I/O: says where bytes go and takes them.

    `received` may raise a ProtocolError, which closes the connection at once.
    """

    def get_buffer(self) -> memoryview: ...

    def received(self, count: int) -> None: ...

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that the protocol itself holds back."""

    @property
    def busy(self) -> bool:
        """True while a request is on its way in or is being answered."""

    def leave(self) -> None:
        """Take no new request: tell the client so, finish what is under way, then close."""

    def check(self, now_s: float) -> float | None:
        """Give up what takes too long; return when to look again, None if nothing is under way."""

    def closed(self, reason: RemoraError) -> None:
        """The connection is gone: cancel what is open."""
