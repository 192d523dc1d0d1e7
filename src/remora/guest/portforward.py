"""Port-forwards: a stream of channel port 1026 becomes a TCP connection within the guest, whatever address the server
listens on."""

from __future__ import annotations

import errno
import os
import socket

from remora.guest.pumps import FromDescriptor, ToDescriptor
from remora.reactor import WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from remora.guest.streams import Stream
    from remora.reactor import Reactor

_MAX_LINE_BYTES = 16


class Forward:
    """One forwarded connection. The first line of the stream is the port."""

    def __init__(self, reactor: Reactor, stream: Stream) -> None:
        self._reactor = reactor
        self._stream = stream
        self._line = b""
        self._sock: Optional[socket.socket] = None
        self._halves = 2
        stream.on_data = self._read_port
        stream.on_eof = stream.reset

    def _read_port(self, data: memoryview) -> None:
        self._line += bytes(data)
        head, newline, rest = self._line.partition(b"\n")
        if not newline:
            if len(self._line) > _MAX_LINE_BYTES:
                self._stream.reset()
            return
        self._stream.consumed(len(head) + 1)
        if not head.isdigit() or not 0 < int(head) < 1 << 16:
            self._stream.reset()
            return
        self._early = rest
        self._eof = False
        # What comes before the connection stands is kept: it is bounded, as no credit is given back for it.
        self._stream.on_data = self._keep
        self._stream.on_eof = self._ended_early
        self._stream.on_reset = self._drop
        self._dial(int(head), socket.AF_INET, "127.0.0.1")

    def _keep(self, data: memoryview) -> None:
        self._early += bytes(data)

    def _ended_early(self) -> None:
        self._eof = True

    def _dial(self, port: int, family: int, address: str) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._sock = sock
        code = sock.connect_ex((address, port))
        if code not in (0, errno.EINPROGRESS):
            self._failed(port, family)
            return

        def connected(_events: int) -> None:
            self._reactor.unregister(sock.fileno())
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._failed(port, family)
            else:
                self._join(sock)

        self._reactor.register(sock.fileno(), WRITE, connected)

    def _failed(self, port: int, family: int) -> None:
        self._drop()
        if family == socket.AF_INET:
            self._dial(port, socket.AF_INET6, "::1")
        else:
            self._stream.reset()

    def _drop(self) -> None:
        if self._sock is not None:
            self._reactor.unregister(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _join(self, sock: socket.socket) -> None:
        self._down = ToDescriptor(self._reactor, os.dup(sock.fileno()), self._down_done)
        self._up = FromDescriptor(self._reactor, os.dup(sock.fileno()), self._half_done)
        self._down.attach(self._stream)
        if self._early:
            self._down.feed(memoryview(self._early))
        if self._eof:
            self._down.finish()
        self._stream.on_reset = self._close
        self._up.attach(self._stream)

    def _down_done(self) -> None:
        if self._sock is None:
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()  # the server is gone
            return
        self._half_done()

    def _half_done(self) -> None:
        self._halves -= 1
        if not self._halves:
            self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self._up.close()
            self._down.close()
            self._stream.reset()
