"""What a detached sandbox writes, and how its process ends: kept by the monitor, as nobody else is there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from remora.errors import RemoraError
from remora.reactor import READ, Reactor
from remora.sandboxes.guest import MAIN, Guest, open_stream
from remora.sandboxes.logfiles import CHUNK_BYTES, LogWriter
from remora.wire.guest_v1 import WaitResponse

#: How long output may still be on its way once the process has ended.
DRAIN_S = 5.0


class OutputKeeper:
    """Copies the process's output to log files, on the monitor's reactor."""

    def __init__(self, reactor: Reactor, directory: Path, channel: Path, *, terminal: bool) -> None:
        """Attach to the process's streams; may be called in another thread than the reactor's.

        Args:
            directory: Where the logs go.
            channel: Where the guest's channel is.

        Raises:
            UnavailableError: the guest is gone.
        """
        self._reactor = reactor
        self._directory = directory
        self._channel = channel
        names = {"tty": "stdout"} if terminal else {"stdout": "stdout", "stderr": "stderr"}
        self._open = len(names)
        self._done = threading.Event()
        for stream, name in names.items():
            self._start(open_stream(channel, MAIN, stream), name)

    def _start(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self._reactor.post(lambda: self._copy(sock, LogWriter(self._directory, name)))

    def follow_process(self, ended: Callable[[WaitResponse], None], failed: Callable[[RemoraError], None]) -> None:
        """Call `ended` once the process has ended and its output is in the files; in a thread of its own."""

        def wait() -> None:
            try:
                with Guest(self._channel) as guest:
                    response = guest.wait(MAIN)
                self._done.wait(DRAIN_S)
                ended(response)
            except RemoraError as error:
                failed(error)

        threading.Thread(target=wait, name="waiter", daemon=True).start()

    def _copy(self, sock: socket.socket, writer: LogWriter) -> None:
        def ready(_events: int) -> None:
            try:
                data = sock.recv(CHUNK_BYTES)
                if data:
                    writer.write(data)
                    return
            except BlockingIOError:
                return
            except OSError as error:
                # The disk is full, or the guest is gone: the process is not made to wait for its log.
                self._reactor.on_error(error)
            self._reactor.unregister(sock.fileno())
            sock.close()
            writer.close()
            self._open -= 1
            if not self._open:
                self._done.set()

        self._reactor.register(sock.fileno(), READ, ready)
