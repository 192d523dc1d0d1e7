"""Accepting connections on `remora.reactor`, no more than a bound, and none lost when descriptors run out."""

from __future__ import annotations

import errno
import socket

from remora.reactor import READ, Reactor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Set

    from remora.wire.ttrpc.reactor import ServerConnection

_ACCEPTS_PER_TURN = 64
#: Pause of accepting when this process has no descriptors left; the backlog waits meanwhile.
_ACCEPT_PAUSE_S = 0.1


class Listener:
    """Accepts connections until closed; refuses (closes) those beyond `max_connections`."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_connection: Callable[[socket.socket], Optional[ServerConnection]],
        max_connections: int,
    ) -> None:
        sock.setblocking(False)
        self.connections: Set[ServerConnection] = set()
        self._reactor = reactor
        self._sock = sock
        self._on_connection = on_connection
        self._max_connections = max_connections
        reactor.register(sock.fileno(), READ, self._ready)

    def close(self, *, connections: bool = True) -> None:
        """Stop accepting, close the listening socket and, unless told otherwise, the connections."""
        if self._sock.fileno() >= 0:
            self._reactor.unregister(self._sock.fileno())
            self._sock.close()
        if connections:
            for connection in list(self.connections):
                connection.close()

    def _ready(self, _events: int) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._pause()
                raise
            if len(self.connections) >= self._max_connections:
                sock.close()
                continue
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._on_connection(sock)
            if connection is None:
                sock.close()
                continue
            self.connections.add(connection)
            connection.add_close_callback(self.connections.discard)

    def _pause(self) -> None:
        fd = self._sock.fileno()
        self._reactor.modify(fd, 0)

        def go_on() -> None:
            if self._sock.fileno() >= 0:
                self._reactor.modify(fd, READ)

        self._reactor.call_later(_ACCEPT_PAUSE_S, go_on)


def listen(
    reactor: Reactor,
    sock: socket.socket,
    on_connection: Callable[[socket.socket], Optional[ServerConnection]],
    *,
    max_connections: int = 1024,
) -> Listener:
    """Accept connections on a listening socket. `on_connection` makes each one's ServerConnection, or returns None."""
    return Listener(reactor, sock, on_connection, max_connections)
