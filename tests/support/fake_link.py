"""FakeLink: the client's side of an HTTP connection for tests without sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remora.agent.web.exchange import Piece
from remora.errors import RemoraError


class FakeLink:
    """Takes everything at once, unless `stuck`: then `on_sent` waits for `take`."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.holding = self.finished = self.stuck = False
        self.refusals: list[RemoraError] = []
        self._waiting: list[Callable[[], None]] = []

    def transmit(self, pieces: Sequence[Piece], on_sent: Callable[[], None] | None = None) -> None:
        for piece in pieces:
            self.sent += piece
        if on_sent is not None and self.stuck:
            self._waiting.append(on_sent)
        elif on_sent is not None:
            on_sent()

    def take(self) -> None:
        """The client has read what was sent."""
        self.stuck = False
        waiting, self._waiting = self._waiting, []
        for on_sent in waiting:
            on_sent()

    def hold(self, reading: bool) -> None:
        self.holding = reading

    def refused(self, error: RemoraError) -> None:
        self.refusals.append(error)

    def finish(self) -> None:
        self.finished = True
