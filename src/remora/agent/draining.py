"""Stopping without losing an answer: what runs finishes and is sent, and only then the agent ends.

Without a successor, new sessions and operations are refused as UNAVAILABLE with a hint when to try again, and an upload
that is coming in may end. With one, nothing is refused: what is new waits in the queues of the listening sockets, which
the successor has, too; connections are closed as soon as nothing is under way on them, and their clients find the
successor, which resumes the sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remora.agent.core import Core
from remora.agent.hints import with_retry
from remora.agent.peers import Peer
from remora.errors import RemoraError, UnavailableError

#: When a client may expect the next agent.
_RETRY_S = 1.0
_LOOK_S = 0.02
#: How long a client that sends without a pause may go on before its connection is closed under what it sends next.
_GENTLE_S = 0.2


class Draining:
    """One drain of an agent; asking again shortens its time but never lengthens it."""

    def __init__(self, core: Core, stop: Callable[[], None]) -> None:
        self._core = core
        self._stop = stop
        self._until_s = self._gentle_until_s = 0.0
        self._waiters: list[Callable[[int], None]] = []
        self._set_quiet: Callable[[bool], None] | None = None
        self._over = False
        self.begun = False
        #: Counts what is still to be sent behind the doors' connections.
        self.unsent: Callable[[], int] = lambda: 0

    def begin(
        self,
        timeout_s: float,
        done: Callable[[int], None] | None = None,
        *,
        set_quiet: Callable[[bool], None] | None = None,
    ) -> None:
        """Drain, then stop the agent. `done` gets the number of requests that had to be given up.

        Args:
            set_quiet: Leaves new connections in the listening sockets' queues, or takes them again: there is a
                successor who has these sockets.
        """
        core = self._core
        now_s = core.reactor.now_s()
        if done is not None:
            self._waiters.append(done)
        if self.begun:
            self._until_s = min(self._until_s, now_s + timeout_s)
            return
        self.begun, self._until_s, self._gentle_until_s = True, now_s + timeout_s, now_s + _GENTLE_S
        self._set_quiet = set_quiet
        if set_quiet is not None:
            set_quiet(True)
        else:
            core.sessions.closed = core.execution.closed = refusal
        core.log.info("agent draining", timeout_s=timeout_s, requests=core.execution.count)
        self._look()

    def abandon(self) -> None:
        """The successor has died: go on serving, unless it is too late."""
        set_quiet = self._set_quiet
        if not self.begun or set_quiet is None or self._over:
            return
        self.begun, self._set_quiet = False, None
        self._waiters.clear()
        set_quiet(False)
        self._see_off(list(self._core.peers))
        self._core.log.error("drain abandoned", reason="the successor has died: this agent goes on")

    def _look(self) -> None:
        core, now_s = self._core, self._core.reactor.now_s()
        if self._over or not self.begun:
            return
        if self._set_quiet is not None:
            self._leave(list(core.peers), gently=now_s < self._gentle_until_s)
        left = self._left()
        if left and now_s < self._until_s:
            core.reactor.call_later(_LOOK_S, self._look)
            return
        self._over = True
        core.log.info("agent drained", given_up=left)
        for done in self._waiters:
            done(left)
        core.reactor.call_soon(self._stop)  # after the answers to those who asked

    @staticmethod
    def _leave(peers: Sequence[Peer], *, gently: bool) -> None:
        for peer in peers:
            if peer.connection is not None:
                peer.connection.leave(gently=gently)

    def _see_off(self, peers: Sequence[Peer]) -> None:
        """Close the connections that were to end: some are not read any more. Their clients come back to us."""
        left = [peer for peer in self._core.peers if peer in peers]
        if left:
            self._leave(left, gently=True)
            self._core.reactor.call_later(_LOOK_S, lambda: self._see_off(left))

    def _left(self) -> int:
        """Return how much is under way: requests in whichever stage, and uploads, which a successor continues."""
        uploading = 0 if self._set_quiet is not None else self._core.store.uploading()
        return max(self._core.execution.count, self._core.peers.under_way()) + uploading + self.unsent()


def refusal() -> RemoraError:
    """Return what is answered to whatever is new."""
    return with_retry(UnavailableError("the agent is draining and takes nothing new"), _RETRY_S)
