"""Stopping without losing an answer: nothing new begins, what runs finishes and is sent, and only then the agent ends.

New sessions and operations are refused as UNAVAILABLE with a hint when to try again: whoever replaces this agent
resumes the sessions, so a client that waits and sends again loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from remora.agent.core import Core
from remora.agent.hints import with_retry
from remora.errors import RemoraError, UnavailableError

#: When a client may expect the next agent.
_RETRY_S = 1.0
_LOOK_S = 0.02


class Draining:
    """One drain of an agent; asking again shortens its time but never lengthens it."""

    def __init__(self, core: Core, stop: Callable[[], None]) -> None:
        self._core = core
        self._stop = stop
        self._until_s = 0.0
        self._waiters: list[Callable[[int], None]] = []
        self._over = False
        self.begun = False

    def begin(self, timeout_s: float, done: Callable[[int], None] | None = None) -> None:
        """Drain, then stop the agent. `done` gets the number of requests that had to be given up."""
        core = self._core
        until_s = core.reactor.now_s() + timeout_s
        if done is not None:
            self._waiters.append(done)
        if self.begun:
            self._until_s = min(self._until_s, until_s)
            return
        self.begun, self._until_s = True, until_s
        core.sessions.closed = core.execution.closed = refusal
        core.log.info("agent draining", timeout_s=timeout_s, requests=core.execution.count)
        self._look()

    def _look(self) -> None:
        core = self._core
        unsent = any(getattr(peer.connection, "out_bytes", 0) for peer in core.peers)
        idle = core.execution.idle and not unsent
        if not idle and core.reactor.now_s() < self._until_s:
            core.reactor.call_later(_LOOK_S, self._look)
            return
        if self._over:
            return
        self._over = True
        left = core.execution.count
        core.log.info("agent drained", given_up=left)
        for done in self._waiters:
            done(left)
        core.reactor.call_soon(self._stop)  # after the answers to those who asked


def refusal() -> RemoraError:
    """Return what is answered to whatever is new."""
    return with_retry(UnavailableError("the agent is draining and takes nothing new"), _RETRY_S)
