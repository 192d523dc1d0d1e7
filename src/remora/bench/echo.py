"""The yardstick: a peer that answers N bytes with the same N bytes over a blocking Unix socket, and nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _receive(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`; returns False at end of file."""
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def serve(sock: socket.socket, size_bytes: int) -> None:
    """Echo messages of `size_bytes` until the peer leaves."""
    view = memoryview(bytearray(size_bytes))
    while _receive(sock, view):
        sock.sendall(view)


@contextmanager
def echo(size_bytes: int) -> Iterator[Callable[[], None]]:
    """Start an echo process; yields a function that makes one round trip of `size_bytes`."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "remora.bench.echo", str(theirs.fileno()), str(size_bytes)]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        message, answer = bytes(size_bytes), memoryview(bytearray(size_bytes))

        def round_trip() -> None:
            ours.sendall(message)
            if not _receive(ours, answer):
                raise ConnectionError("the echo process ended")

        try:
            round_trip()
            yield round_trip
        finally:
            ours.close()
            process.wait()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as peer:
        serve(peer, int(sys.argv[2]))
