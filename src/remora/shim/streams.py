"""Carries a process's standard streams between containerd's pipes and the guest, without a copy in Python.

A pipe (FIFO) is opened for both directions on purpose: then a restart of containerd, which closes its end for a moment,
is neither an end of input nor a broken pipe. Bytes go by splice(2) from the guest's socket into the pipe and back; what
a slow reader does not take stays in the guest, whose process then waits.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable

from remora.errors import InvalidArgumentError
from remora.reactor import READ, WRITE, Reactor

_CHUNK_BYTES = 1 << 20
_TURNS = 8
_SPLICE_FLAGS = 2  # SPLICE_F_NONBLOCK


class Pump:
    """Moves bytes from one descriptor to another until the first one's end; owns both. Reactor's thread only."""

    def __init__(self, reactor: Reactor, source: int, target: int, on_end: Callable[[], None]) -> None:
        self._reactor = reactor
        self._source = source
        self._target = target
        self._on_end = on_end
        self._watched = -1
        #: Read, and not taken by the target yet.
        self._unwritten = memoryview(b"")
        pipes = stat.S_ISFIFO(os.fstat(source).st_mode), stat.S_ISFIFO(os.fstat(target).st_mode)
        self._splices = any(pipes)
        self._watch(source)

    @property
    def ended(self) -> bool:
        return self._source < 0

    def close(self) -> None:
        """Stop, without `on_end`."""
        if self._source >= 0:
            self._watch(-1)
            os.close(self._source)
            os.close(self._target)
            self._source = self._target = -1

    def _watch(self, fd: int) -> None:
        if fd != self._watched:
            if self._watched >= 0:
                self._reactor.unregister(self._watched)
            if fd >= 0:
                self._reactor.register(fd, READ if fd == self._source else WRITE, self._ready)
            self._watched = fd

    def _ready(self, _events: int) -> None:
        waited_for_source = self._watched == self._source
        try:
            for _ in range(_TURNS):
                if not self._move():
                    self._end()
                    return
                waited_for_source = False
        except BlockingIOError:
            # Of the two, it is the one that was not just ready.
            self._watch(self._target if waited_for_source or self._unwritten else self._source)
        except OSError:
            self._end()

    def _move(self) -> int:
        if self._splices:
            return os.splice(self._source, self._target, _CHUNK_BYTES, flags=_SPLICE_FLAGS)
        if not self._unwritten:
            self._unwritten = memoryview(os.read(self._source, 65536))
            if not self._unwritten:
                return 0
        written = os.write(self._target, self._unwritten)
        self._unwritten = self._unwritten[written:]
        return written

    def _end(self) -> None:
        self.close()
        self._on_end()


class Streams:
    """The streams of one process. `output_ended` is called once all output is with containerd."""

    def __init__(self, reactor: Reactor, stdin: str, stdout: str, stderr: str, terminal: bool) -> None:
        self._reactor = reactor
        self.paths = (stdin, stdout, stderr)
        self.terminal = terminal
        self._outputs: list[Pump] = []
        self._input: Pump | None = None
        self._input_sock: socket.socket | None = None
        self._input_held = -1
        self._waiting: Callable[[], None] | None = None
        for path in (stdout, stderr):
            check(path)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The guest's streams that somebody reads or writes here."""
        stdin, stdout, stderr = self.paths
        if self.terminal:
            return ("tty",) if stdin or stdout else ()
        return tuple(name for name, path in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)) if path)

    def attach(self, socks: dict[str, socket.socket]) -> None:
        """Join the guest's streams with the pipes; takes the sockets over."""
        stdin, stdout, stderr = self.paths
        if self.terminal:
            for sock in socks.values():
                if stdout:
                    self._output(sock.dup(), stdout)
                if stdin:
                    self._feed(sock.dup(), stdin)
                sock.close()
            return
        for name, path in (("stdout", stdout), ("stderr", stderr)):
            if name in socks:
                self._output(socks[name], path)
        if "stdin" in socks:
            self._feed(socks["stdin"], stdin)

    def close_stdin(self) -> None:
        """Let the process read end of file once its input's writers have gone; harmless if that was done before."""
        if self._input_held >= 0:
            os.close(self._input_held)
            self._input_held = -1

    def when_drained(self, callback: Callable[[], None], timeout_s: float) -> None:
        """Call once: all output has been passed on, or `timeout_s` are over (a child may keep a pipe open)."""
        self._waiting = callback
        self._reactor.call_later(timeout_s, self._drained)
        self._check()

    def close(self) -> None:
        self.close_stdin()
        self._end_input()
        for pump in self._outputs:
            pump.close()

    def _output(self, sock: socket.socket, path: str) -> None:
        sock.setblocking(False)
        target = open_output(path)
        self._outputs.append(Pump(self._reactor, sock.detach(), target, self._check))

    def _feed(self, sock: socket.socket, path: str) -> None:
        sock.setblocking(False)
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # Our own writer: without CloseIO, a client that lets go of the pipe is not the end.
        self._input_held = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._input_sock = sock
        self._input = Pump(self._reactor, source, os.dup(sock.fileno()), self._end_input)

    def _end_input(self) -> None:
        if self._input is not None:
            self._input.close()
        sock, self._input_sock = self._input_sock, None
        if sock is not None:
            try:
                if not self.terminal:
                    sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the process is gone
            sock.close()

    def _check(self) -> None:
        if all(pump.ended for pump in self._outputs):
            self._drained()

    def _drained(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()


def check(path: str) -> None:
    """Refuse a place for output that is neither a pipe nor a file.

    Raises:
        InvalidArgumentError: it names a logging program.
    """
    scheme = path.partition("://")[0] if "://" in path else ""
    if scheme not in ("", "file", "fifo"):
        raise InvalidArgumentError(
            f"output to {scheme}:// is not supported", fix="use pipes (the default), or file:///path"
        )


def open_output(path: str) -> int:
    if path.startswith("file://"):
        return os.open(path.removeprefix("file://"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    # Both directions: never blocks, and never breaks.
    return os.open(path.removeprefix("fifo://"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
