"""The accelerator's doors inside the guest: each connection to one of their sockets is a stream to its channel port.

It copies bytes and knows no protocol, so whatever the agent speaks on a port reaches the function unchanged.
"""

from __future__ import annotations

import os
import socket

from remora.errors import ResourceExhaustedError
from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.reactor import READ
from remora.wire.ports import OIP_PORT, PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Optional, Set

    from remora.guest.streams import Carrier, Stream
    from remora.reactor import Reactor

#: Sockets in the directory that the container sees as /run/remora, and the channel port that each leads to.
DOORS = {"accel.sock": PORT, "oip.sock": OIP_PORT}
_MAX_CONNECTIONS = 256


class Connection:
    """One socket and one stream. Both directions end alone; an error on either side ends both."""

    def __init__(self, reactor: Reactor, sock: socket.socket, stream: Stream, owner: Set[Connection]) -> None:
        self._sock = sock
        self._stream = stream
        self._owner = owner
        self._halves = 2
        self._up = FromDescriptor(reactor, os.dup(sock.fileno()), self._half_done)
        self._down = ToDescriptor(reactor, os.dup(sock.fileno()), self._down_done)
        owner.add(self)
        self._down.attach(stream)
        stream.on_accepted = self._accepted
        stream.on_reset = self.close

    def hold(self, held: bool) -> None:
        self._up.hold(held)

    def close(self) -> None:
        if self._halves >= 0:
            self._halves = -1
            self._owner.discard(self)
            self._stream.reset()
            self._up.close()
            self._down.close()
            self._sock.close()

    def _accepted(self) -> None:
        self._up.attach(self._stream)

    def _down_done(self) -> None:
        if self._halves > 0:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()  # the peer is gone: nothing is left to carry
                return
            self._half_done()

    def _half_done(self) -> None:
        self._halves -= 1
        if self._halves == 0:
            self._halves = -1
            self._owner.discard(self)
            self._up.close()
            self._down.close()
            self._sock.close()


class Forwarder:
    """Listens in `directory`; `doors` are names of sockets and channel ports."""

    def __init__(
        self, reactor: Reactor, directory: str, channel: Carrier, doors: Optional[Dict[str, int]] = None
    ) -> None:
        self._reactor = reactor
        self._channel = channel
        self._connections: Set[Connection] = set()
        self._listeners: List[socket.socket] = []
        for name, port in (DOORS if doors is None else doors).items():
            self._listen(os.path.join(directory, name), port)

    def _listen(self, path: str, port: int) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        listener.bind(path)
        # Any user of the container may use the accelerator: the host tells guests apart, not users.
        os.chmod(path, 0o666)
        listener.listen(64)
        self._listeners.append(listener)
        self._reactor.register(listener.fileno(), READ, lambda _events: self._accept(listener, port))

    @property
    def connections(self) -> int:
        return len(self._connections)

    def reset(self) -> None:
        """Close all connections, as the transport's reset does: their owners connect again."""
        for connection in list(self._connections):
            connection.close()

    def hold(self, held: bool) -> None:
        for connection in self._connections:
            connection.hold(held)

    def close(self) -> None:
        self.reset()
        for listener in self._listeners:
            self._reactor.unregister(listener.fileno())
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket, port: int) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        try:
            stream = self._channel.open(port)
        except ResourceExhaustedError:
            sock.close()  # the function sees a closed connection and may try again
            raise
        Connection(self._reactor, sock, stream, self._connections)
