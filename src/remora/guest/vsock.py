"""The guest's end of the channel where the monitor has a vsock device: every stream is a socket of its own.

Only the host may come in: a process of the guest that found a way to connect to PID 1's ports (vsock has a loopback) is
turned away by its CID. After a restore every socket reports a reset, and the host connects anew.
"""

from __future__ import annotations

import errno
import socket

from remora.errors import ResourceExhaustedError
from remora.guest.streams import Stream, nothing
from remora.reactor import READ, WRITE, is_hangup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Mapping, Optional

    from remora.reactor import Reactor

#: VMADDR_CID_HOST and VMADDR_CID_ANY of linux/vm_sockets.h.
HOST_CID = 2
_ANY_CID = 0xFFFFFFFF
_READ_BYTES = 65536
#: Bytes that a stream's owner may leave unconsumed before its socket is read no further.
WINDOW_BYTES = 262144
_BACKLOG = 128
_MAX_STREAMS = 1024
_CONNECTING = (errno.EINPROGRESS, errno.EAGAIN)


def listen(port: int) -> socket.socket:
    """Return a socket that takes connects to `port` from whoever can reach this guest."""
    sock = _socket()
    sock.bind((_ANY_CID, port))
    sock.listen(_BACKLOG)
    return sock


def dial(port: int) -> socket.socket:
    """Return a socket that is being connected to the host's `port`."""
    sock = _socket()
    error = sock.connect_ex((HOST_CID, port))
    if error and error not in _CONNECTING:
        sock.close()
        raise OSError(error, f"the host's port {port} cannot be reached")
    return sock


def from_host(address: Any) -> bool:
    """Whether a connection's peer is the host."""
    return bool(address[0] == HOST_CID)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


class _Connection:
    """A stream's socket and what is to be waited for on it."""

    __slots__ = ("sock", "stream", "unconsumed", "blocked", "connecting", "events", "hung_up")

    def __init__(self, sock: socket.socket, stream: Stream) -> None:
        self.sock = sock
        self.stream = stream
        self.unconsumed = 0
        #: The stream's owner waits until more can be sent.
        self.blocked = False
        self.connecting = False
        #: What the reactor watches; None: not at all.
        self.events: Optional[int] = None
        #: The peer has closed, and what it sent before is still to be read.
        self.hung_up = False


class VsockChannel:
    """Streams over vsock, for the same owners as the mux's (guest/channel.py).

    Args:
        services: by port, called with each stream that the host opens to it.
        on_restart: called when another host, or the same one anew, is at the other end.
        listening, dialling, trusted: how sockets are made and peers told apart; tests use Unix sockets.
    """

    def __init__(
        self,
        reactor: Reactor,
        services: Mapping[int, Callable[[Stream], None]],
        on_restart: Callable[[], None] = nothing,
        *,
        listening: Callable[[int], socket.socket] = listen,
        dialling: Callable[[int], socket.socket] = dial,
        trusted: Callable[[Any], bool] = from_host,
    ) -> None:
        self._reactor = reactor
        self._on_restart = on_restart
        self._dial = dialling
        self._trusted = trusted
        self._connections: Dict[int, _Connection] = {}
        self._listeners = []
        for port, service in services.items():
            sock = listening(port)
            self._listeners.append(sock)
            reactor.register(sock.fileno(), READ, self._acceptor(sock, port, service))

    def close(self) -> None:
        """End every stream without a word to its owner, and listen no more."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for sock in self._listeners:
            self._reactor.unregister(sock.fileno())
            sock.close()

    # -- streams ----------------------------------------------------------------------------------------------------

    def open(self, port: int) -> Stream:
        """Ask the host for a stream to `port`; `on_accepted` or `on_reset` follows."""
        self._check_room()
        try:
            sock = self._dial(port)
        except OSError:
            refused = Stream(self, -1, port)
            refused.open = False
            self._reactor.call_soon(lambda: refused.on_reset())
            return refused
        stream = Stream(self, sock.fileno(), port)
        connection = self._add(sock, stream)
        connection.connecting = True
        self._watch(connection)
        return stream

    def send(self, stream: Stream, data: bytes) -> int:
        connection = self._connections[stream.number]
        if connection.connecting:
            connection.blocked = True
            return 0
        try:
            taken = connection.sock.send(data)
        except BlockingIOError:
            taken = 0
        except OSError:
            # Its owner may be in the middle of something: it is told in a turn of its own.
            self._reactor.call_soon(lambda: self._broken(connection))
            return len(data)
        if taken < len(data):
            connection.blocked = True
            self._watch(connection)
        return taken

    def close_write(self, stream: Stream) -> None:
        connection = self._connections[stream.number]
        stream.sending = False
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer has gone; reading tells
        self._drop_if_done(connection)

    def reset(self, stream: Stream) -> None:
        self._drop(self._connections[stream.number])

    def consumed(self, stream: Stream, count: int) -> None:
        connection = self._connections[stream.number]
        connection.unconsumed -= count
        self._watch(connection)

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call once, when all that streams have taken has left: a socket keeps nothing back."""
        self._reactor.call_soon(callback)

    # -- sockets ----------------------------------------------------------------------------------------------------

    def _acceptor(self, listener: socket.socket, port: int, service: Callable[[Stream], None]) -> Callable[[int], None]:
        def accept(_events: int) -> None:
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            if not self._trusted(address) or len(self._connections) >= _MAX_STREAMS:
                sock.close()
                return
            sock.setblocking(False)
            connection = self._add(sock, Stream(self, sock.fileno(), port))
            service(connection.stream)
            self._watch(connection)

        return accept

    def _check_room(self) -> None:
        if len(self._connections) >= _MAX_STREAMS:
            raise ResourceExhaustedError(f"{_MAX_STREAMS} streams to the host are open", fix="close some of them")

    def _add(self, sock: socket.socket, stream: Stream) -> _Connection:
        connection = _Connection(sock, stream)
        self._connections[sock.fileno()] = connection
        return connection

    def _watch(self, connection: _Connection) -> None:
        """Wait for what can happen next: at least for a hang-up, unless that is known and data wait for room."""
        stream = connection.stream
        if not stream.open:
            return
        events: Optional[int] = 0
        if not connection.connecting and stream.receiving and connection.unconsumed < WINDOW_BYTES:
            events = READ
        elif connection.hung_up:
            events = None
        if events is not None and (connection.connecting or connection.blocked):
            events |= WRITE
        if events == connection.events:
            return
        fd = stream.number
        if events is None:
            self._reactor.unregister(fd)
        elif connection.events is None:
            self._reactor.register(fd, events, lambda ready: self._ready(connection, ready))
        else:
            self._reactor.modify(fd, events)
        connection.events = events

    def _ready(self, connection: _Connection, events: int) -> None:
        stream = connection.stream
        connection.hung_up = is_hangup(events)
        try:
            if connection.connecting:
                self._connected(connection)
            elif events & WRITE and connection.blocked:
                connection.blocked = False
                stream.on_writable()
            if stream.open and stream.receiving:
                if connection.unconsumed < WINDOW_BYTES and events & ~WRITE:
                    self._read(connection)
            elif stream.open and connection.hung_up:
                self._broken(connection)
            self._watch(connection)
        except Exception as error:  # noqa: BLE001 - one stream's fault must not cost others their events
            self._reactor.on_error(error)
            if stream.open:
                self._drop(connection)

    def _connected(self, connection: _Connection) -> None:
        if connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._broken(connection)
            return
        connection.connecting = False
        connection.blocked = False
        connection.stream.on_accepted()
        if connection.stream.open:
            connection.stream.on_writable()

    def _read(self, connection: _Connection) -> None:
        stream = connection.stream
        try:
            data = connection.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._broken(connection)
            # Never so in a stream's ordinary life: this is how all of them end at a restore.
            self._on_restart()
            return
        if data:
            connection.unconsumed += len(data)
            stream.on_data(memoryview(data))
            return
        stream.receiving = False
        self._drop_if_done(connection)
        stream.on_eof()
        if stream.open and connection.hung_up:
            # The peer takes nothing either.
            self._broken(connection)

    def _broken(self, connection: _Connection) -> None:
        """The peer is gone: tell the stream's owner."""
        if connection.stream.open:
            self._drop(connection)
            connection.stream.on_reset()

    def _drop_if_done(self, connection: _Connection) -> None:
        if not connection.stream.sending and not connection.stream.receiving:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        connection.stream.open = False
        del self._connections[connection.stream.number]
        if connection.events is not None:
            self._reactor.unregister(connection.stream.number)
        connection.sock.close()
