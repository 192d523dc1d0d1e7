"""Receives a terminal's descriptor from crun (--console-socket)."""

from __future__ import annotations

import array
import os
import socket

from remora.reactor import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from remora.guest.stdio import Stdio
    from remora.reactor import Reactor


class Console:
    def __init__(self, reactor: Reactor, path: str, stdio: Stdio) -> None:
        self.path = path
        self._reactor = reactor
        self._stdio = stdio
        self._connection: Optional[socket.socket] = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(path)
        self._listener.listen(1)
        reactor.register(self._listener.fileno(), READ, self._accept)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            # crun may have sent and exited within one turn of the loop.
            self._listener.setblocking(False)
            if self._connection is None:
                self._accept()
            if self._connection is not None:
                self._receive()
            self._reactor.unregister(self._listener.fileno())
            self._listener.close()
            os.unlink(self.path)

    def _accept(self, _events: int = 0) -> None:
        try:
            self._connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # crun never connected
        self._reactor.register(self._connection.fileno(), READ, self._receive)

    def _receive(self, _events: int = 0) -> None:
        connection = self._connection
        if connection is None or connection.fileno() < 0:
            return
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        self._reactor.unregister(connection.fileno())
        connection.close()
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(data[:4])
                self._stdio.terminal_opened(descriptors[0])
