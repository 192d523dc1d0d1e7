"""Lets workers start a few at a time.

Why: a start is 0.3 s of computing, mostly imports. After a restart of the agent every tenant wants its worker at once,
and on two cores all of them would be there late; in turn, the first is there as soon as it would be alone, and the last
no later. The worker that all tenants share goes first.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from remora.reactor import Reactor, Timer
from remora.workers.process import WorkerProcess

#: A start that takes longer than this no longer keeps the next one waiting.
_PATIENCE_S = 2.0


class Starts:
    """Counts the workers that are starting, and calls who waits for one of them to be through."""

    def __init__(self, reactor: Reactor, most: int = 0) -> None:
        """
        Args:
            most: Starts at the same time; 0: half as many as there are processors, but one at least.
        """
        self._reactor = reactor
        self._most = most or max(1, len(os.sched_getaffinity(0)) // 2)
        self._starting: dict[WorkerProcess, Timer] = {}
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def free(self) -> bool:
        """True if another worker may start now."""
        return len(self._starting) < self._most

    def wait(self, again: Callable[[], None], *, first: bool = False) -> None:
        """Call `again` when a worker may start; it starts one, or does not need it any more."""
        if first:
            self._waiting.appendleft(again)
        else:
            self._waiting.append(again)

    def began(self, process: WorkerProcess) -> None:
        """A worker has been started: it counts until it is ready or dead, or takes too long."""
        self._starting[process] = self._reactor.call_later(_PATIENCE_S, lambda: self._through(process))
        process.on_started = lambda: self._through(process)

    def _through(self, process: WorkerProcess) -> None:
        timer = self._starting.pop(process, None)
        if timer is not None:
            timer.cancel()
        while self._waiting and self.free:
            self._waiting.popleft()()

    def close(self) -> None:
        """Call nobody any more."""
        self._waiting.clear()
        for timer in self._starting.values():
            timer.cancel()
        self._starting.clear()
