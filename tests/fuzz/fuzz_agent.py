"""An agent's core in this process, with fake workers that answer at once: what the doors' targets talk to."""

from __future__ import annotations

import atexit
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import run_leftovers
from fake_workers import FakeBlock, FakeJob
from remora.agent.core import Core
from remora.agent.identity import Identity
from remora.agent.logs import Log, Value
from remora.agent.peers import Peer
from remora.agent.policy import Limits, Policy
from remora.errors import NotFoundError, RemoraError
from remora.reactor import Reactor
from remora.workers import contract
from remora.workers.arena import Region
from remora.workers.contract import (
    Job,
    LabelScore,
    Measurement,
    ModelSource,
    ModelSpec,
    Result,
    TensorSpec,
    TensorView,
    WorkerInfo,
)

IDENTITY = Identity("sandbox:fuzz", "sandbox:fuzz", "fuzz")
LIMITS = Limits(
    message_bytes=4 << 20,
    json_bytes=1 << 20,
    in_flight_bytes_per_tenant=16 << 20,
    sessions_per_tenant=64,
    resources_per_tenant=32,
)


class FakeInstantWorkers:
    """Gives inputs back as outputs, zeroes where results have a shape. Counts the memory it lends."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self.lent = 0
        self.on_death: Callable[[str, str], None] = lambda _domain, _reason: None
        self.confinement: Mapping[str, str] = {}

    def allocate(self, _tenant: str, size_bytes: int) -> FakeBlock:
        self.lent += 1
        return FakeBlock(size_bytes, self._back)

    def _back(self) -> None:
        self.lent -= 1

    def share(self, tenant: str, size_bytes: int) -> contract.Region:
        return Region(tenant, size_bytes)

    def unshare(self, region: contract.Region) -> None:
        pass

    def load(self, _domain: str, source: ModelSource, done: Callable[[ModelSpec | RemoraError], None]) -> None:
        tensor = (TensorSpec("input", "float32", (-1,)),)
        spec = ModelSpec(source.key, source.task, tensor, (TensorSpec("output", "float32", (-1,)),), "cpu", 1)
        self._reactor.call_soon(lambda: done(spec))

    def unload(self, domain: str, key: str) -> None:
        pass

    def submit(self, job: Job, done: Callable[[Result | RemoraError], None]) -> FakeJob:
        zeroes = [
            TensorView(spec.name, spec.dtype, spec.shape, memoryview(bytes(_size_bytes(spec)))) for spec in job.results
        ]
        if job.operation in ("compute", "exec"):
            result = Result(outputs=tuple(zeroes), run_us=1)
        elif job.operation in contract.MAPS:
            dtype = contract.MAPS[job.operation]
            spec = TensorSpec("map", dtype, (2, 2))
            found = TensorView("map", dtype, (2, 2), memoryview(bytes(_size_bytes(spec))))
            result = Result(outputs=(found,), labels=(LabelScore(0, "label", 0.0),), run_us=1)
        elif job.operation in contract.PICTURES:
            place = (0.5,) * contract.PLACE_NUMBERS[job.operation]
            result = Result(labels=(LabelScore(0, "label", 0.5, place),), run_us=1)
        else:
            result = Result(outputs=job.inputs, run_us=1)
        self._reactor.call_soon(lambda: done(result))
        return FakeJob(job, done)

    def measure(
        self,
        _domain: str,
        _key: str,
        _shapes: Sequence[Sequence[int]],
        _most_rows: int,
        done: Callable[[Measurement | RemoraError], None],
    ) -> None:
        self._reactor.call_soon(lambda: done(NotFoundError("nothing is measured here")))

    def submit_together(self, jobs: Sequence[tuple[Job, Callable[[Result | RemoraError], None]]]) -> list[FakeJob]:
        return [self.submit(job, done) for job, done in jobs]

    def slots(self, _domain: str) -> int:
        return 4

    def release_domain(self, domain: str) -> None:
        pass

    def workers(self) -> list[WorkerInfo]:
        return []

    def close(self) -> None:
        pass


def _size_bytes(spec: TensorSpec) -> int:
    size = {"float32": 4, "float64": 8, "int32": 4, "int64": 8}.get(spec.dtype, 1)
    for length in spec.shape:
        size *= length
    assert 0 <= size <= 64 << 20, f"a result of {spec.shape} was asked for"
    return size


class QuietLog(Log):
    """Nobody reads the lines of millions of cases."""

    def info(self, event: str, **fields: Value) -> None:
        """Drop a line."""

    def of_tenant(self, tenant: str, event: str, *, level: str = "warning", **fields: Value) -> None:
        """Drop a line."""


class FuzzAgent:
    """A core, and the faults that it heard of: there must be none."""

    def __init__(self) -> None:
        state = run_leftovers.directory("remora-fuzz-")
        atexit.register(shutil.rmtree, state, ignore_errors=True)
        self.faults: list[BaseException] = []
        self.reactor = Reactor(self.faults.append)
        self.workers = FakeInstantWorkers(self.reactor)
        log = QuietLog(json_lines=False)
        model = state / "model"
        model.write_bytes(b"a model")
        digest = "sha256:" + sha256(model.read_bytes()).hexdigest()
        source = ModelSource("identity", digest, model, "onnx", "tensor")
        pictures = ModelSource("pictures", digest, model, "onnx", "classification")
        info = SimpleNamespace(description="", licence="", size_bytes=1)
        catalogue: Any = {one.key: SimpleNamespace(source=one, info=info) for one in (source, pictures)}
        self.core = Core(self.reactor, state, Policy(limits=LIMITS), self.workers, catalogue, log)

        box: list[Any] = []
        self.core.sessions.create(IDENTITY, box.append)
        self.turn(lambda: box)
        for name in catalogue:  # so that requests need no disk, which answers when it likes
            self.core.models.ensure(box[0][0], name, box.append)
        self.turn(lambda: len(box) > len(catalogue))

    def join(self) -> Peer:
        return self.core.peers.join(IDENTITY)

    def turn(self, until: Callable[[], object], timeout_s: float = 5.0) -> None:
        """Run the loop until something has happened."""
        end_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end_s, "the agent does not answer"
            self.reactor.run_once(0.05)

    def settle(self) -> None:
        """Run what is due now, and see that nothing went wrong in it."""
        for _ in range(8):
            self.reactor.run_once(0)
        if self.faults:
            raise self.faults.pop()


@cache
def agent() -> FuzzAgent:
    """Return the one agent of this process."""
    return FuzzAgent()
