"""The accelerator's door inside the guest: each connection to /run/remora/accel.sock is a stream to channel port 2048.

It copies bytes and knows no protocol, so whatever the agent speaks on that port reaches the function unchanged.
"""

from __future__ import annotations

import os
import socket

from remora.errors import ResourceExhaustedError
from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.reactor import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Set

    from remora.guest.channel import Channel, Stream
    from remora.reactor import Reactor

ACCELERATOR_PORT = 2048
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
    def __init__(self, reactor: Reactor, path: str, channel: Channel) -> None:
        self._reactor = reactor
        self._channel = channel
        self._connections: Set[Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._listener.bind(path)
        os.chmod(
            path, 0o666
        )  # any user of the container may use the accelerator: the host tells guests apart, not users
        self._listener.listen(64)
        reactor.register(self._listener.fileno(), READ, self._accept)

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
        self._reactor.unregister(self._listener.fileno())
        self._listener.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        try:
            stream = self._channel.open(ACCELERATOR_PORT)
        except ResourceExhaustedError:
            sock.close()  # the function sees a closed connection and may try again
            raise
        Connection(self._reactor, sock, stream, self._connections)
