"""Disk work that may block (write, fsync, hashing) done beside the reactor: few threads, bounded queues.

Work with the same key is done in order by the same thread, so that the chunks of one upload need no lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from remora.errors import InternalError, RemoraError, ResourceExhaustedError

T = TypeVar("T")
THREADS = 2
#: Waiting pieces of work per thread. A chunk in the queue holds its receive buffer, which the tenant's limit on
#: in-flight bytes bounds; this bounds the number.
QUEUE_LENGTH = 1024


class DiskPool:
    """Runs functions in threads and hands their results back through `post`."""

    def __init__(self, post: Callable[[Callable[[], None]], None], threads: int = THREADS) -> None:
        self._post = post
        self._queues: list[queue.Queue[Callable[[], None] | None]] = [queue.Queue(QUEUE_LENGTH) for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"disk-{number}", daemon=True)
            for number, work in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, work: Callable[[], T], done: Callable[[T | RemoraError], None]) -> None:
        """Do `work` in a thread, then call `done` with its value or its RemoraError in the reactor's thread.

        Raises:
            ResourceExhaustedError: too much disk work waits.
        """

        def run() -> None:
            outcome: T | RemoraError
            try:
                outcome = work()
            except RemoraError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 - the border of the thread: handed on as an answer
                failure = InternalError(f"disk work failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                outcome = failure
            self._post(lambda: done(outcome))

        try:
            self._queues[hash(key) % len(self._queues)].put_nowait(run)
        except queue.Full as error:
            raise ResourceExhaustedError(
                f"{QUEUE_LENGTH} pieces of disk work wait already", fix="send the request again later"
            ) from error

    def close(self) -> None:
        """Finish what waits, and end."""
        for work in self._queues:
            work.put(None)
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _run(work: queue.Queue[Callable[[], None] | None]) -> None:
        while (step := work.get()) is not None:
            step()
