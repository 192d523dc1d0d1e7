"""The agent's rooms put together without sockets, for tests that need no process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from remora.agent.disk import DiskPool
from remora.agent.files import ResourceFiles
from remora.agent.journal import Journal
from remora.agent.policy import Limits, StoreLimits
from remora.agent.sessions import Session, Sessions
from remora.agent.store import Store
from remora.reactor import Reactor

T = TypeVar("T")


class Box(Generic[T]):
    """Keeps what a callback was called with."""

    def __init__(self) -> None:
        self.values: list[T] = []

    def __call__(self, value: T) -> None:
        self.values.append(value)


class Rooms:
    """Journal, disk threads, store and sessions over one state directory."""

    def __init__(self, state: Path, limits: Limits, store_limits: StoreLimits) -> None:
        state.mkdir(exist_ok=True)
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        self.wall_s = 1_000_000.0
        self.now_s = 1000.0
        self.ended: list[Session] = []
        self.journal = Journal(state / "journal.sqlite", self.reactor.post, self.errors.append)
        self.disk = DiskPool(self.reactor.post, self.errors.append)
        self.files = ResourceFiles(state)
        self.store = Store(self.files, self.journal, self.disk, store_limits, limits, lambda: self.wall_s)
        self.sessions = Sessions(self.journal, self.store, limits, lambda: self.now_s, self.ended.append)

    def run_until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "the callback was not called"
            self.reactor.run_once(0.05)

    def wait(self, box: Box[T]) -> T:
        """Run the loop until the callback was called; return what it was called with."""
        self.run_until(lambda: box.values)
        return box.values.pop(0)

    def settle(self) -> None:
        """Let everything that was begun reach the disk."""
        done: Box[object] = Box()
        self.journal.write(done=done)
        self.wait(done)

    def close(self) -> None:
        self.disk.close()
        self.journal.close()
        self.reactor.close()
        assert not self.errors, self.errors


@contextmanager
def rooms(state: Path, limits: Limits | None = None, store_limits: StoreLimits | None = None) -> Iterator[Rooms]:
    opened = Rooms(state, limits or Limits(), store_limits or StoreLimits())
    try:
        yield opened
    finally:
        opened.close()
