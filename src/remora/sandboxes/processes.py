"""A process in a guest, as a host program sees it: three byte streams, an exit status, signals."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from remora.errors import RemoraError, UnavailableError
from remora.sandboxes.guest import Guest, open_stream

CHUNK_BYTES = 65536


class Output(NamedTuple):
    """What `communicate` returns. `exit_status` is as a shell has it: 128 + n for signal n."""

    exit_status: int
    stdout: bytes
    stderr: bytes


class GuestProcess:
    """A started process and its streams: sockets, of which half-close is end of file.

    With a terminal there is only `tty`, which carries both directions. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        guest: Guest,
        directory: Path,
        process_id: str,
        *,
        terminal: bool = False,
        stdin: bool = True,
        explain: Callable[[RemoraError], RemoraError] = lambda error: error,
    ) -> None:
        """Attach to the streams of a process; `explain` may know better why the guest is gone."""
        self.id = process_id
        self._guest = guest
        self._explain = explain
        self.tty: socket.socket | None = None
        self.stdin: socket.socket | None = None
        self.stdout: socket.socket | None = None
        self.stderr: socket.socket | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            try:
                if terminal:
                    self.tty = open_stream(directory, process_id, "tty")
                else:
                    self.stdout = open_stream(directory, process_id, "stdout")
                    self.stderr = open_stream(directory, process_id, "stderr")
                    if stdin:
                        self.stdin = open_stream(directory, process_id, "stdin")
            except UnavailableError as error:
                raise explain(error) from error
            undo.pop_all()

    def __enter__(self) -> GuestProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the streams; the process goes on."""
        for sock in (self.tty, self.stdin, self.stdout, self.stderr):
            if sock is not None:
                # A thread that reads from it keeps it open until this wakes it.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()

    def close_stdin(self) -> None:
        """Let the process read end of file."""
        if self.stdin is not None:
            with contextlib.suppress(OSError):
                self.stdin.shutdown(socket.SHUT_WR)

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit status, as a shell has it.

        Raises:
            DeadlineExceededError: it still runs after `timeout_s`.
            UnavailableError: the microVM ended first; the message says why.
        """
        try:
            return int(self._guest.wait(self.id, timeout_s).exit_status)
        except UnavailableError as error:
            raise self._explain(error) from error

    def signal(self, signum: int) -> None:
        self._guest.signal(self.id, signum)

    def resize(self, rows: int, columns: int) -> None:
        self._guest.resize(self.id, rows, columns)

    def communicate(self, stdin: bytes = b"", *, timeout_s: float | None = None) -> Output:
        """Send `stdin`, then collect the output to its end and wait; all of it is kept in memory."""
        gathered: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        def collect(sock: socket.socket, into: bytearray) -> None:
            with contextlib.suppress(OSError):
                while data := sock.recv(CHUNK_BYTES):
                    into += data

        def feed(sock: socket.socket) -> None:
            # A process need not read its input.
            with contextlib.suppress(OSError):
                sock.sendall(stdin)
            self.close_stdin()

        threads = []
        for sock, name in ((self.tty or self.stdout, "stdout"), (self.stderr, "stderr")):
            if sock is not None:
                threads.append(threading.Thread(target=collect, args=(sock, gathered[name]), daemon=True))
        if self.stdin is not None:
            threads.append(threading.Thread(target=feed, args=(self.stdin,), daemon=True))
        for thread in threads:
            thread.start()
        status = self.wait(timeout_s)
        # The guest answers once the streams have everything; what is left is on its way through the host.
        for thread in threads[: 1 if self.tty else 2]:
            thread.join()
        return Output(status, bytes(gathered["stdout"]), bytes(gathered["stderr"]))
