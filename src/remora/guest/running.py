"""A process of a container, from its start to whoever asks for its status; and the signals it gets."""

from __future__ import annotations

import os
import signal

from remora.guest import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Optional

    from remora.guest.stdio import Stdio

#: Signals whose default is not to end the process (signal(7)).
_HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP, signal.SIGTTIN,
             signal.SIGTTOU, signal.SIGSTOP, signal.SIGKILL}  # fmt: skip


class Running:
    """One process of the container, from its start on; its status can be asked for again after its end.

    `first`: it is the container's own process, the first one of its PID namespace.
    """

    def __init__(self, name: str, stdio: Stdio, first: bool) -> None:
        self.name = name
        self.stdio = stdio
        self.first = first
        self.pid = 0
        self.exit_status: Optional[int] = None
        self.oom_killed = False
        #: Kills for want of memory in its container while it ran.
        self.oom_kills = 0
        #: The host has had it killed.
        self.killed = False
        #: Set when PID 1 ends it in place of a signal that the kernel would have dropped.
        self.ended_by = 0
        self._waiters: List[Callable[[], None]] = []
        self._end_waiters: List[Callable[[], None]] = []
        self._finished = False

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.exit_status is None

    def when_finished(self, callback: Callable[[], None]) -> None:
        """Call once: the process has ended and its output has been handed over."""
        if self._finished:
            self.stdio.when_handed_over(callback)
        else:
            self._waiters.append(callback)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call once the process has ended, wherever its output is."""
        if self.exit_status is not None:
            callback()
        else:
            self._end_waiters.append(callback)

    def ended(self, status: int, oom_killed: bool, oom_kills: int) -> None:
        self.exit_status = 128 + self.ended_by if self.ended_by and status == 128 + signal.SIGKILL else status
        # A child may have been the victim, long ago; this one was killed by request.
        self.oom_killed = oom_killed and not self.killed
        self.oom_kills = oom_kills
        waiters, self._end_waiters = self._end_waiters, []
        for waiter in waiters:
            waiter()
        self.stdio.process_ended()
        self.stdio.when_handed_over(self._finish)

    def kill(self, number: int) -> None:
        """Deliver a signal as if the process were not first in its PID namespace."""
        # The kernel drops signals that a namespace's first process has not asked for (pid_namespaces(7)); anywhere
        # else the default would end it. SIGKILL does that here, and the status tells what was meant.
        if self.first and number not in _HARMLESS and not _handles(self.pid, number):
            self.ended_by = number
            number = signal.SIGKILL
        self.killed = self.killed or number == signal.SIGKILL
        kill_if_there(self.pid, number)

    def interrupted(self, group: int, number: int) -> None:
        """The terminal has just sent a signal: see that a namespace's first process obeys it by default."""
        unheard = number not in _HARMLESS and self.first and group == self.pid and self.exit_status is None
        if unheard and not _handles(self.pid, number):
            self.kill(number)

    def _finish(self) -> None:
        self._finished = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()


def kill_if_there(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended, and its status says how


def _handles(pid: int, number: int) -> bool:
    """Return whether the process catches, ignores or blocks the signal (proc(5), status)."""
    try:
        status = system.read_text(f"/proc/{pid}/status")
    except FileNotFoundError:
        return True
    for line in status.splitlines():
        name, _, mask = line.partition(":")
        if name in ("SigCgt", "SigIgn", "SigBlk") and int(mask, 16) >> (number - 1) & 1:
            return True
    return False
