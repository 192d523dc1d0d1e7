"""FakeWorkers: stands in for the worker pool where a test needs faults and orders that real workers do not produce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from remora.errors import CancelledError, RemoraError, ResourceExhaustedError
from remora.workers import contract
from remora.workers.arena import Region
from remora.workers.contract import Job, Measurement, ModelSource, ModelSpec, Result, TensorSpec, WorkerInfo

#: Model, one row of each input, most rows, and what to call with the result.
Measure = tuple[str, list[tuple[int, ...]], int, Callable[[Measurement | RemoraError], None]]
Done = Callable[[Result | RemoraError], None]


class FakeBlock:
    def __init__(self, size_bytes: int, on_release: Callable[[], None]) -> None:
        self.view = memoryview(bytearray(size_bytes))
        self._on_release = on_release
        self.released = 0

    def release(self) -> None:
        self.released += 1
        self._on_release()


@dataclass
class FakeJob:
    job: Job
    done: Done
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def answer(self, outcome: Result | RemoraError) -> None:
        self.done(outcome)


@dataclass
class FakeWorkers:
    """Keeps jobs until the test answers them. A model whose name holds `broken` does not load."""

    slot_count: int = 1
    arena_bytes: int = 1 << 20
    jobs: list[FakeJob] = field(default_factory=list)
    loads: list[tuple[str, str]] = field(default_factory=list)
    unloads: list[tuple[str, str]] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    pending_loads: list[Callable[[], None]] = field(default_factory=list)
    hold_loads: bool = False
    measures: list[Measure] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    allocated_bytes: int = 0
    closed: bool = False
    confinement: Mapping[str, str] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_death: Callable[[str, str], None] = lambda _domain, _reason: None

    def allocate(self, tenant: str, size_bytes: int) -> FakeBlock:
        if self.allocated_bytes + size_bytes > self.arena_bytes:
            raise ResourceExhaustedError(f"the arena of {tenant} is full")
        self.allocated_bytes += size_bytes

        def back() -> None:
            self.allocated_bytes -= size_bytes

        return FakeBlock(size_bytes, back)

    def share(self, tenant: str, size_bytes: int) -> Region:
        region = Region(tenant, size_bytes)
        self.regions.append(region)
        return region

    def unshare(self, region: contract.Region) -> None:
        next(one for one in self.regions if one.id == region.id).close()

    def load(self, domain: str, source: ModelSource, done: Callable[[ModelSpec | RemoraError], None]) -> None:
        self.loads.append((domain, source.key))
        outcome: ModelSpec | RemoraError = ModelSpec(
            source.key,
            source.task,
            (TensorSpec("input", "float32", (-1,)),),
            (TensorSpec("output", "float32", (-1,)),),
            "cpu",
            1,
        )
        if "broken" in source.key:
            outcome = RemoraError("this model is broken")
        if self.hold_loads:
            self.pending_loads.append(lambda: done(outcome))
        else:
            done(outcome)

    def unload(self, domain: str, key: str) -> None:
        self.unloads.append((domain, key))

    def submit(self, job: Job, done: Done) -> FakeJob:
        pending = FakeJob(job, done)
        self.jobs.append(pending)
        return pending

    def measure(
        self,
        domain: str,
        key: str,
        shapes: Sequence[Sequence[int]],
        most_rows: int,
        done: Callable[[Measurement | RemoraError], None],
    ) -> None:
        self.measures.append((key, [tuple(shape) for shape in shapes], most_rows, done))

    def submit_together(self, jobs: Sequence[tuple[Job, Done]]) -> list[FakeJob]:
        self.batches.append(len(jobs))
        return [self.submit(job, done) for job, done in jobs]

    def finish(self, outcome: Result | RemoraError | None = None) -> None:
        """Answer the oldest job."""
        pending = self.jobs.pop(0)
        if outcome is None:
            outcome = CancelledError("the job was cancelled") if pending.cancelled else Result(run_us=1000)
        pending.answer(outcome)

    def slots(self, domain: str) -> int:
        return self.slot_count

    def release_domain(self, domain: str) -> None:
        self.released.append(domain)

    def workers(self) -> Sequence[WorkerInfo]:
        return []

    def close(self) -> None:
        self.closed = True
