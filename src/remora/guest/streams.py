"""A byte stream between the guest and its host, whatever carries it: the mux on a serial port, or a vsock."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Protocol

    class Carrier(Protocol):
        """What a stream asks of its channel."""

        def open(self, port: int) -> Stream: ...
        def send(self, stream: Stream, data: bytes) -> int: ...
        def close_write(self, stream: Stream) -> None: ...
        def reset(self, stream: Stream) -> None: ...
        def consumed(self, stream: Stream, count: int) -> None: ...
        def when_drained(self, callback: Callable[[], None]) -> None: ...


def nothing() -> None:
    """What a stream's owner wants done that has said nothing."""


class Stream:
    """One stream. The callbacks may be set at any time before data can come; data is valid only during `on_data`."""

    __slots__ = (
        "_channel",
        "number",
        "port",
        "on_data",
        "on_eof",
        "on_reset",
        "on_writable",
        "on_accepted",
        "open",
        "sending",
        "receiving",
    )

    def __init__(self, channel: Carrier, number: int, port: int) -> None:
        self._channel = channel
        self.number = number
        self.port = port
        self.open = True
        self.sending = True
        self.receiving = True
        self.on_data: Callable[[memoryview], None] = self._credit_and_drop
        self.on_eof: Callable[[], None] = nothing
        self.on_reset: Callable[[], None] = nothing
        self.on_writable: Callable[[], None] = nothing
        self.on_accepted: Callable[[], None] = nothing

    def send(self, data: bytes) -> int:
        """Return how many bytes were taken; fewer than all: wait for `on_writable`."""
        if not self.open:
            return 0
        return self._channel.send(self, data)

    def close_write(self) -> None:
        if self.open:
            self._channel.close_write(self)

    def reset(self) -> None:
        """End both directions now; `on_reset` is not called."""
        if self.open:
            self._channel.reset(self)

    def consumed(self, count: int) -> None:
        if self.open and count:
            self._channel.consumed(self, count)

    def ignore_input(self) -> None:
        """Credit and drop what the peer sends: this stream carries bytes one way."""
        self.on_data = self._credit_and_drop
        self.on_eof = nothing

    def _credit_and_drop(self, data: memoryview) -> None:
        self.consumed(len(data))
