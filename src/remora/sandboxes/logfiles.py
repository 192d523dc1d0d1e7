"""The output of a detached sandbox, in files that cannot grow without bound.

Two files per stream: the current one and the one before. When the current one is full it becomes the one before, so at
least `limit_bytes` of the newest output are always there, and never more than twice that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT_BYTES = 8 << 20
CHUNK_BYTES = 65536


class LogWriter:
    """Appends one stream to `<directory>/<name>.log`."""

    def __init__(self, directory: Path, name: str, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = directory / f"{name}.log"
        self._limit = limit_bytes
        self._fd = self._open()
        self._size = 0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        if self._size >= self._limit:
            os.close(self._fd)
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))
            self._fd = self._open()
            self._size = 0
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._size += len(data)

    def close(self) -> None:
        os.close(self._fd)


def read(directory: Path, name: str, *, is_live: Callable[[], bool], wait: Callable[[], None]) -> Iterator[bytes]:
    """Yield what a stream has written so far and, as long as `is_live`, what it still writes.

    `wait` is called when there is nothing new; without following pass an `is_live` that is false.
    """
    path = directory / f"{name}.log"
    older = path.with_name(path.name + ".1")
    if older.exists():
        yield from _chunks(older)
    try:
        current = path.open("rb")
    except FileNotFoundError:
        return
    try:
        while True:
            # Asked before the last read: what was written before the end must not be missed.
            live = is_live()
            while data := current.read(CHUNK_BYTES):
                yield data
            if not live:
                return
            if _was_replaced(current.fileno(), path):
                current.close()
                current = path.open("rb")
                continue
            wait()
    finally:
        current.close()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _was_replaced(fd: int, path: Path) -> bool:
    try:
        return os.fstat(fd).st_ino != path.stat().st_ino
    except FileNotFoundError:
        return False
