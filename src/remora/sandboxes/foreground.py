"""Makes a process in a guest look like one of ours: our stdin, stdout, stderr, terminal and signals are its own.

One thread per stream with blocking reads and writes: a regular file cannot be polled, and nothing else gives the same
back-pressure. The main thread waits for what happens (the process ended, a signal came, time is up) and is the only
one that decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import select
import signal
import socket
import struct
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from remora.errors import RemoraError, UnavailableError
from remora.sandboxes.processes import CHUNK_BYTES, GuestProcess

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: A second Ctrl-C within this time ends the microVM although its process ignores it.
INSIST_S = 2.0
#: How long a process may take to end after --timeout's SIGTERM, or after SIGPIPE, before SIGKILL.
GRACE_S = 2.0
#: How long output may still be on its way once the process has ended.
DRAIN_S = 10.0
TIMEOUT_STATUS = 124


class _Ended(NamedTuple):
    status: int


class _Failed(NamedTuple):
    error: RemoraError


class _Signal(NamedTuple):
    number: int


class _OutputClosed(NamedTuple):
    """Whoever read our output is gone."""


class _Inbox:
    """What the main thread waits for. A pipe and not a queue: a signal that comes just before a queue's lock is waited
    for would be seen only at the next event, and Python writes each signal into this pipe (`set_wakeup_fd`).
    """

    def __init__(self) -> None:
        self._events: deque[object] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake_r, select.POLLIN)
        self.wakeup_fd = self._wake_w

    def put(self, event: object) -> None:
        """Safe from threads and from signal handlers."""
        self._events.append(event)
        with contextlib.suppress(BlockingIOError):
            # A full pipe wakes all the same.
            os.write(self._wake_w, b"\0")

    def get(self, timeout_s: float | None) -> object:
        """Return the next event, or None when `timeout_s` has passed."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            if self._poll.poll(None if left_s is None else left_s * 1000 + 1):
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
        return self._events.popleft()


def terminal_size(fd: int = 0) -> tuple[int, int]:
    """Return (rows, columns) of our terminal."""
    packed = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
    rows, columns, _, _ = struct.unpack("HHHH", packed)
    return rows or 24, columns or 80


@contextlib.contextmanager
def raw_terminal(fd: int = 0) -> Iterator[None]:
    """Pass every key on as it comes; the terminal is put back in order whatever happens."""
    before = termios.tcgetattr(fd)
    try:
        # Not TCSAFLUSH: what was typed meanwhile is meant for the process.
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Foreground:
    """Runs one process on our own streams. Main thread only, as it takes the signals."""

    def __init__(self, process: GuestProcess) -> None:
        self._process = process
        self._events = _Inbox()
        self._controls: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._outputs: list[threading.Thread] = []
        self._last_interrupt_s = float("-inf")

    def run(self, timeout_s: float | None = None) -> int:
        """Return the exit status to end with.

        Raises:
            UnavailableError: the microVM ended before the process did; the message says why.
        """
        with contextlib.ExitStack() as stack:
            if self._process.tty is not None and os.isatty(0):
                stack.enter_context(raw_terminal())
            stack.callback(
                signal.set_wakeup_fd, signal.set_wakeup_fd(self._events.wakeup_fd, warn_on_full_buffer=False)
            )
            for signum in FORWARDED:
                # What our caller has us ignore (nohup) stays ignored.
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._take(stack, signum)
            if self._process.tty is not None:
                self._take(stack, signal.SIGWINCH)
            self._start()
            return self._wait(timeout_s)

    def _take(self, stack: contextlib.ExitStack, signum: int) -> None:
        before = signal.signal(signum, lambda number, _frame: self._events.put(_Signal(number)))
        stack.callback(signal.signal, signum, before)

    def _start(self) -> None:
        process = self._process
        if process.tty is not None:
            self._thread(lambda: self._output(process.tty, 1), output=True)
            self._thread(lambda: self._input(process.tty))
        else:
            self._thread(lambda: self._output(process.stdout, 1), output=True)
            self._thread(lambda: self._output(process.stderr, 2), output=True)
            if process.stdin is not None:
                self._thread(lambda: self._input(process.stdin))
        self._thread(self._wait_for_end)
        self._thread(self._control)

    def _thread(self, target: object, *, output: bool = False) -> None:
        thread = threading.Thread(target=target, daemon=True)  # type: ignore[arg-type]
        thread.start()
        if output:
            self._outputs.append(thread)

    # -- the main thread --------------------------------------------------------------------------------------------

    def _wait(self, timeout_s: float | None) -> int:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        kill_at_s: float | None = None
        timed_out = False
        while True:
            event = self._next(deadline_s, kill_at_s)
            match event:
                case _Ended(status):
                    self._drain()
                    return TIMEOUT_STATUS if timed_out else status
                case _Failed(error):
                    if timed_out:
                        return TIMEOUT_STATUS
                    raise error
                case _Signal(signal.SIGWINCH):
                    self._controls.put(("resize", 0))
                case _Signal(number):
                    if number == signal.SIGINT and self._insists():
                        self._controls.put(("signal", signal.SIGKILL))
                        self._next(time.monotonic() + GRACE_S)
                        return 128 + signal.SIGINT
                    self._controls.put(("signal", number))
                case _OutputClosed():
                    self._controls.put(("signal", signal.SIGPIPE))
                    kill_at_s = time.monotonic() + GRACE_S
                case None if kill_at_s is not None and time.monotonic() >= kill_at_s:
                    self._controls.put(("signal", signal.SIGKILL))
                    # A guest that does not even do that is ended by our caller, who closes the sandbox.
                    if timed_out:
                        self._next(None, time.monotonic() + GRACE_S)
                        return TIMEOUT_STATUS
                    kill_at_s = None
                case None:
                    timed_out, deadline_s = True, None
                    self._controls.put(("signal", signal.SIGTERM))
                    kill_at_s = time.monotonic() + GRACE_S

    def _next(self, *deadlines_s: float | None) -> object:
        """Return the next event, or None at the first deadline."""
        known = [deadline_s for deadline_s in deadlines_s if deadline_s is not None]
        return self._events.get(max(0.0, min(known) - time.monotonic()) if known else None)

    def _insists(self) -> bool:
        now_s = time.monotonic()
        last_s, self._last_interrupt_s = self._last_interrupt_s, now_s
        return now_s - last_s < INSIST_S

    def _drain(self) -> None:
        """The guest has handed everything to the streams; let it come through to our output."""
        deadline_s = time.monotonic() + DRAIN_S
        for thread in self._outputs:
            while thread.is_alive() and time.monotonic() < deadline_s:
                thread.join(0.05)

    # -- other threads ----------------------------------------------------------------------------------------------

    def _wait_for_end(self) -> None:
        try:
            self._events.put(_Ended(self._process.wait()))
        except RemoraError as error:
            self._events.put(_Failed(error))

    def _control(self) -> None:
        """Send signals and sizes: a guest that is slow to take them must not stop the main thread."""
        while True:
            what, number = self._controls.get()
            try:
                if what == "resize":
                    self._process.resize(*terminal_size())
                else:
                    self._process.signal(number)
            except UnavailableError:
                return  # the end is reported by the thread that waits for it
            except RemoraError:
                continue  # the process has just ended
            except OSError:
                continue  # our terminal is gone

    def _input(self, sock: socket.socket | None) -> None:
        assert sock is not None
        try:
            while data := os.read(0, CHUNK_BYTES):
                sock.sendall(data)
        except OSError:
            pass  # our terminal has gone, or the process has closed its input: either way there is no more
        if self._process.tty is None:
            self._process.close_stdin()

    def _output(self, sock: socket.socket | None, fd: int) -> None:
        assert sock is not None
        try:
            while data := sock.recv(CHUNK_BYTES):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        except BrokenPipeError:
            self._events.put(_OutputClosed())
            with contextlib.suppress(OSError):
                while sock.recv(CHUNK_BYTES):
                    pass
        except OSError as error:
            # A full disk behind our stdout; or the channel broke, which the thread that waits reports.
            if error.errno not in (errno.ECONNRESET, errno.EBADF):
                self._events.put(_Failed(UnavailableError(f"the output cannot be written: {error.strerror}")))
