"""PID 1's side of `remora.ready()`: a function waits here, on /run/remora/guest.sock, while its microVM becomes a
template, and goes on in each clone with entropy of its own.

Protocol: the function sends `READY\n`; the answer is `GO <hex entropy>\n`, which comes at once where the host never
asked for a template.
"""

from __future__ import annotations

import os
import socket

from remora.reactor import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Set

    from remora.reactor import Reactor

_MAX_CONNECTIONS = 64
_ENTROPY_BYTES = 32


class Ready:
    """Args:
    path: Where to listen.
    template: Whether to hold functions until `go`.
    """

    def __init__(self, reactor: Reactor, path: str, *, template: bool) -> None:
        self._reactor = reactor
        self._template = template
        self._open: Set[socket.socket] = set()
        self._held: List[socket.socket] = []
        self._waiters: List[Callable[[], None]] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.listener.bind(path)
        os.chmod(path, 0o666)  # any user of the container may say that it is ready
        self.listener.listen(16)
        reactor.register(self.listener.fileno(), READ, self._accept)

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call once, when a function has said that it is ready (or has already, and waits)."""
        if self._held:
            callback()
        else:
            self._waiters.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        if callback in self._waiters:
            self._waiters.remove(callback)

    def go(self) -> None:
        """Let every function that waits go on, and those to come: this microVM has its own identity now."""
        self._template = False
        held, self._held = self._held, []
        for connection in held:
            self._answer(connection)

    def close(self) -> None:
        self._reactor.unregister(self.listener.fileno())
        self.listener.close()
        for connection in list(self._open):
            self._close(connection)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self.listener.accept()
        except BlockingIOError:
            return
        if len(self._open) >= _MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._open.add(connection)
        self._reactor.register(connection.fileno(), READ, lambda _events: self._read(connection))

    def _read(self, connection: socket.socket) -> None:
        try:
            line = connection.recv(64)
        except BlockingIOError:
            return
        except ConnectionResetError:
            line = b""
        if line != b"READY\n":  # six bytes come in one piece over a Unix socket; anything else is not the SDK
            self._close(connection)
            return
        if connection in self._held:
            return
        if not self._template:
            self._answer(connection)
            return
        self._held.append(connection)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def _answer(self, connection: socket.socket) -> None:
        try:
            connection.send(b"GO " + os.urandom(_ENTROPY_BYTES).hex().encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the function ended while it waited; its own exit is reported
        self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        if connection in self._held:
            self._held.remove(connection)
        self._reactor.unregister(connection.fileno())
        connection.close()
