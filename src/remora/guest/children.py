"""Reaps every process of the guest, as PID 1 must, and tells who waits for one.

A container's process is started by crun, becomes an orphan when crun exits, and may end before PID 1 has read its
number. So while a start is under way, the statuses of unknown processes are kept.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict

    from remora.reactor import Reactor


class Children:
    def __init__(self, reactor: Reactor) -> None:
        self._waiting: Dict[int, Callable[[int], None]] = {}
        self._unclaimed: Dict[int, int] = {}
        self._starting = 0
        reactor.on_signal(signal.SIGCHLD, self.reap)

    def starting(self) -> None:
        """A process will be claimed by `when_ended` whose number is not known yet."""
        self._starting += 1

    def started(self) -> None:
        """The start announced by `starting` is over; its process has been claimed, or there is none."""
        self._starting -= 1
        if not self._starting:
            self._unclaimed.clear()

    def when_ended(self, pid: int, callback: Callable[[int], None]) -> None:
        """Call once with the exit status of `pid` as a shell has it; at once if it has ended already."""
        status = self._unclaimed.pop(pid, None)
        if status is not None:
            callback(status)
        else:
            self._waiting[pid] = callback

    def reap(self) -> None:
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            status = exit_status(wait_status)
            callback = self._waiting.pop(pid, None)
            if callback is not None:
                callback(status)
            elif self._starting:
                self._unclaimed[pid] = status


def exit_status(wait_status: int) -> int:
    """Return a wait status as a shell has it: 128 + n for signal n."""
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)
