"""One thread, one epoll: the loop under the agent, the sandbox monitor and the guest's PID 1.

Why not asyncio: its streams copy every buffer (a 588 KiB message costs 0.8 ms there and 0.1 ms with `recv_into`), it
has no readiness interface that all its loops share, and importing it costs the guest 100 ms under emulation. This loop
does only four things: readiness callbacks, timers, calls from other threads, and child processes by pidfd.

A callback that raises does not stop the loop: the error goes to `on_error`, because one bad connection must not end
all others. Standard library only, Python 3.9.
"""

from __future__ import annotations

import heapq
import os
import select
import signal
import sys
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple, Union

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

_HUP = select.EPOLLHUP | select.EPOLLERR
#: epoll_wait(2) takes 24 days at most; a certificate's end may be a century away.
_MOST_WAIT_S = 86400.0
_PIDFD_OPEN = getattr(os, "pidfd_open", None)


class Timer:
    """A call that will be made at `when_s` on the monotonic clock, unless cancelled before."""

    __slots__ = ("when_s", "callback", "_order")

    def __init__(self, when_s: float, order: int, callback: Callable[[], None]) -> None:
        self.when_s = when_s
        self._order = order
        self.callback: Optional[Callable[[], None]] = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return (self.when_s, self._order) < (other.when_s, other._order)


def _print_error(error: BaseException) -> None:
    import traceback  # costs the guest more to import than this whole module

    traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)


class Reactor:
    """Runs callbacks of ready file descriptors, due timers and posted calls in one thread.

    Only `post` and `stop` may be called from other threads or from signal handlers.
    """

    def __init__(self, on_error: Callable[[BaseException], None] = _print_error) -> None:
        self._epoll = select.epoll()
        self._handlers: Dict[int, Callable[[int], None]] = {}
        self._timers: List[Timer] = []
        self._order = 0
        self._posted: Deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._running = False
        #: One receive buffer for all callbacks, so that a connection needs none while it is idle. What is in it is
        #: only valid until the callback returns.
        self.scratch = memoryview(bytearray(65536))
        self.on_error = on_error
        self.register(self._wake_r, READ, self._drain)

    # -- file descriptors -------------------------------------------------------------------------------------------

    def register(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready (level-triggered). Hang-up and error count as ready to read."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget `fd`; harmless if it is not registered. Call it before closing the descriptor."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- time -------------------------------------------------------------------------------------------------------

    @staticmethod
    def now_s() -> float:
        return time.monotonic()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        self._order += 1
        timer = Timer(time.monotonic() + delay_s, self._order, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call from within the loop's own thread, after the current callback."""
        self._posted.append(callback)

    # -- other threads and processes ------------------------------------------------------------------------------

    def post(self, callback: Callable[[], None]) -> None:
        """Have the loop's thread make this call; safe from any thread."""
        self._posted.append(callback)
        self._wake()

    def watch_pid(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        """Call once when process `pid` ends (it is not reaped). Returns a function that stops watching."""
        if _PIDFD_OPEN is None:
            raise OSError("this Python cannot open pidfds: Linux 5.3 and Python 3.9 are needed")
        fd: int = _PIDFD_OPEN(pid)

        def stop() -> None:
            nonlocal fd
            if fd >= 0:
                self.unregister(fd)
                os.close(fd)
                fd = -1

        def ended(_events: int) -> None:
            stop()
            callback()

        self.register(fd, READ, ended)
        return stop

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Call from the loop when the process gets `signum`. Main thread only."""
        signal.signal(signum, lambda _signum, _frame: self.post(callback))

    # -- running ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._running = False
        self._wake()

    def run(self) -> None:
        """Run until `stop`."""
        self._running = True
        while self._running:
            self.run_once()

    def run_once(self, timeout_s: Optional[float] = None) -> None:
        """Wait for events once, at most `timeout_s`, and make the calls that are due."""
        for fd, events in self._poll(timeout_s):
            handler = self._handlers.get(fd)
            if handler is not None:
                self._call(handler, events)
        if self._timers:
            self._run_timers()
        for _ in range(len(self._posted)):
            self._call(self._posted.popleft())

    def close(self) -> None:
        self.unregister(self._wake_r)
        os.close(self._wake_r)
        os.close(self._wake_w)
        self._epoll.close()

    def _poll(self, timeout_s: Optional[float]) -> List[Tuple[int, int]]:
        if self._posted:
            timeout_s = 0
        elif self._timers:
            due_s = min(_MOST_WAIT_S, max(0.0, self._timers[0].when_s - time.monotonic()))
            timeout_s = due_s if timeout_s is None else min(timeout_s, due_s)
        return self._epoll.poll(timeout_s)

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0].when_s <= now_s:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                self._call(callback)

    def _call(self, callback: Union[Callable[[], None], Callable[[int], None]], *args: Any) -> None:
        try:
            callback(*args)
        except Exception as error:  # noqa: BLE001 - the border of the loop: handed on, never swallowed
            self.on_error(error)

    def _wake(self) -> None:
        try:
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            pass  # the pipe is full: the loop wakes anyway

    def _drain(self, _events: int) -> None:
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            pass


def is_hangup(events: int) -> bool:
    """True if the peer is gone, whether or not bytes are left to read."""
    return bool(events & _HUP)
