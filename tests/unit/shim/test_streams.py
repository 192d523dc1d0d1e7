"""Bytes between two sockets: all of them, in their order, whatever the reader's pace."""

from __future__ import annotations

import os
import socket
import threading
import time

from remora.reactor import Reactor
from remora.shim.streams import Pump

_SIZE = 2 << 20


def test_a_slow_reader_of_a_forwarded_port_gets_every_byte() -> None:
    reactor = Reactor()
    client, ours = socket.socketpair()
    theirs, server = socket.socketpair()
    data = os.urandom(_SIZE)

    def feed() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    with client, ours, theirs, server:
        # The server's end is read by the loop itself, a little at a time: the pump finds it full again and again.
        for sock in (ours, theirs, server):
            sock.setblocking(False)
        pump = Pump(reactor, os.dup(ours.fileno()), os.dup(theirs.fileno()), lambda: theirs.shutdown(socket.SHUT_WR))
        feeder = threading.Thread(target=feed)
        feeder.start()
        got = bytearray()
        end_s = time.monotonic() + 20
        while len(got) < _SIZE and time.monotonic() < end_s:
            reactor.run_once(0)
            try:
                part = server.recv(10_000)
            except BlockingIOError:
                continue
            if not part:
                break
            got += part
        pump.close()
        feeder.join(5)
    assert bytes(got) == data
