"""One upload under way: how far it got, and who waits for its end. No files, no owners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remora.agent.files import Progress
from remora.errors import FailedPreconditionError, InvalidArgumentError, RemoraError

#: (bytes received, complete) of an upload, or why it failed.
PutDone = Callable[[tuple[int, bool] | RemoraError], None]


class Upload:
    """One resource on its way from one tenant; several connections may send it at the same time."""

    __slots__ = ("counted_bytes", "dropped", "path", "progress", "submitted_bytes", "total_bytes", "waiters")

    def __init__(self, path: Path, received_bytes: int, total_bytes: int) -> None:
        self.path = path
        self.progress = Progress(received_bytes)
        #: Received, and handed to the disk thread.
        self.submitted_bytes = received_bytes
        #: Its part of the store's `bytes_stored`.
        self.counted_bytes = received_bytes
        self.total_bytes = total_bytes
        #: Who else wants to know how it ends: connections that upload the same at the same time.
        self.waiters: list[PutDone] = []
        self.dropped = False

    def end(self, outcome: tuple[int, bool] | RemoraError, done: PutDone) -> None:
        """Tell everyone how it ended."""
        for waiter in (done, *self.waiters):
            waiter(outcome)

    def check_chunk(self, offset: int, total_bytes: int, length: int) -> None:
        """Refuse a chunk that does not belong where it says.

        Raises:
            InvalidArgumentError: it does not fit what was announced.
            FailedPreconditionError: bytes before it are missing.
        """
        if total_bytes != self.total_bytes:
            raise InvalidArgumentError(
                f"this upload was announced with {self.total_bytes} bytes, now with {total_bytes}",
                fix="send the same total_bytes with every chunk",
            )
        if not length or offset + length > total_bytes:
            raise InvalidArgumentError(
                f"a chunk of {length} bytes at offset {offset} is not part of {total_bytes} bytes",
                fix="send non-empty chunks that end at total_bytes",
            )
        if offset > self.submitted_bytes:
            raise FailedPreconditionError(
                f"a chunk at offset {offset} would leave a hole: {self.submitted_bytes} bytes were received",
                fix=f"send the chunk at offset {self.submitted_bytes}",
            )
