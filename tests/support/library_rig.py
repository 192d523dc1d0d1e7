"""A worker pool on a reactor of its own, and calls of a tenant's library that wait for their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from c_library import CLibrary
from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.workers.contract import (
    LIBRARY,
    Job,
    ModelSource,
    ModelSpec,
    Result,
    TensorSpec,
    TensorView,
    library_domain,
)
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings


def source_of(*libraries: CLibrary) -> ModelSource:
    main = libraries[-1]
    needs = tuple((needed.digest, needed.path) for needed in libraries[:-1])
    return ModelSource(main.digest, main.digest, main.path, LIBRARY, needs=needs)


class LibraryRig:
    """A pool on a reactor, with calls that wait."""

    def __init__(self, **settings: object) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        values = {"device": "cpu", "standby": 0, "backoff_first_s": 0.01, "stop_grace_s": 0.1} | settings
        self.pool = WorkerPool(self.reactor, WorkerSettings(**values))  # type: ignore[arg-type]  # checked there
        self.domain = ""

    def until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end_s, "it did not happen in time"
            self.reactor.run_once(0.05)
        assert self.errors == []

    def load(self, source: ModelSource, tenant: str = "alice") -> ModelSpec | RemoraError:
        box: list[ModelSpec | RemoraError] = []
        self.domain = library_domain(tenant, source.key)
        self.pool.load(self.domain, source, box.append)
        self.until(lambda: box)
        return box[0]

    def call(
        self,
        key: str,
        symbol: str,
        read: Sequence[bytes] = (),
        write: Sequence[bytes] = (),
        *,
        name: str = "0:0",
        seconds: float | None = None,
    ) -> list[bytes] | RemoraError:
        box: list[Result | RemoraError] = []
        values = tuple(TensorView(name, "uint8", (len(data),), memoryview(data)) for data in (*read, *write))
        results = tuple(TensorSpec(name, "uint8", (len(data),)) for data in write)
        deadline_s = time.monotonic() + seconds if seconds is not None else None
        job = Job("exec", self.domain, "alice", key, values, function=symbol, results=results, deadline_s=deadline_s)
        self.pool.submit(job, box.append)
        self.until(lambda: box)
        if isinstance(box[0], RemoraError):
            return box[0]
        found = [bytes(output.data) for output in box[0].outputs]
        box[0].release()
        return found

    def close(self) -> None:
        self.pool.close()
        self.reactor.close()


@contextmanager
def library_rig(**settings: object) -> Iterator[LibraryRig]:
    made = LibraryRig(**settings)
    try:
        yield made
    finally:
        made.close()
