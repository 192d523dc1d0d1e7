"""A fake of systemd's own socket: takes connections in turn and gives each the answer it was made with."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

from remora.kube import services


class FakeSystemd:
    """Listens on `<root>/run/systemd/private` until it has given its answers."""

    def __init__(self, root: Path, *answers: bytes) -> None:
        (root / "run/systemd").mkdir(parents=True, exist_ok=True)
        self.calls = b""
        self._path = root / "run/systemd/private"
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(30)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                said = connection.recv(1000)
                assert said.startswith(b"\0AUTH EXTERNAL "), said
                connection.sendall(b"OK 1234\r\n")
                said = b""
                while len(said) < 30:
                    said += connection.recv(1000)
                self.calls += said
                connection.sendall(answer)

    def close(self) -> None:
        """Wait until all was answered; leave nothing."""
        self._thread.join(30)
        self._listener.close()
        self._path.unlink()


def message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), 1, 0) + body


def done(result: bytes = b"") -> bytes:
    """Return the answer of a call that went well."""
    return message(2, services._string(result.decode()))


def error(words: bytes) -> bytes:
    """Return a refusal."""
    return message(3, services._string(words.decode()))
