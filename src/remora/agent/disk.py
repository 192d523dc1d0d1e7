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

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        on_failure: Callable[[BaseException], None],
        threads: int = THREADS,
    ) -> None:
        """
        Args:
            on_failure: Called in the reactor's thread with what went wrong in work that nobody waits for.
        """
        self._post = post
        self._on_failure = on_failure
        self._queues: list[queue.SimpleQueue[Callable[[], None] | None]] = [queue.SimpleQueue() for _ in range(threads)]
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

        waiting = self._queue(key)
        if waiting.qsize() >= QUEUE_LENGTH:
            raise ResourceExhaustedError(
                f"{QUEUE_LENGTH} pieces of disk work wait already", fix="send the request again later"
            )
        waiting.put(run)

    def insist(self, key: str, work: Callable[[], None]) -> None:
        """Do work of the agent's own, that no guest can multiply and nobody waits for, however much waits."""

        def run() -> None:
            try:
                work()
            except OSError as error:
                failure = error  # the except clause's own name is gone when the call is made
                self._post(lambda: self._on_failure(failure))

        self._queue(key).put(run)

    def _queue(self, key: str) -> queue.SimpleQueue[Callable[[], None] | None]:
        return self._queues[hash(key) % len(self._queues)]

    def close(self) -> None:
        """Finish what waits, and end."""
        for work in self._queues:
            work.put(None)
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _run(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (step := work.get()) is not None:
            step()
