"""The agent's `Workers`: one confined worker per trust domain, one arena per tenant, and a spare worker in waiting.

The spare has started, imported and confined itself but belongs to nobody; the first upload of a tenant then waits for
its model only. It is never reused: a worker that has served a domain ends with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

from remora.errors import CancelledError, InvalidArgumentError, NotFoundError, RemoraError, UnavailableError
from remora.reactor import Reactor, Timer
from remora.workers import launcher
from remora.workers.arena import Arena, ArenaBlock, Region
from remora.workers.cells import Cells
from remora.workers.contract import LIBRARY, PICTURES, SHARED, Job, ModelSource, WorkerInfo, library_domain
from remora.workers.contract import Region as SharedRegion
from remora.workers.domain import Domain
from remora.workers.jobs import Done, PendingJob
from remora.workers.process import WorkerProcess, memory_bytes
from remora.workers.residents import LoadDone, MeasureDone
from remora.workers.settings import WorkerSettings
from remora.workers.starts import Starts

_OPERATIONS = (*PICTURES, "infer", "compute", "exec", "noop")
#: A new spare starts this long after the last was taken, so that it does not compete with the one who took it.
_SPARE_DELAY_S = 1.0


class _Handle:
    """The caller's way to give a job up."""

    __slots__ = ("_domain", "_pending")

    def __init__(self, domain: Domain | None, pending: PendingJob) -> None:
        self._domain = domain
        self._pending = pending

    def cancel(self) -> None:
        if self._domain is not None:
            self._domain.give_up(self._pending, CancelledError("the job was cancelled"))


class WorkerPool:
    """Implements `contract.Workers` on a reactor. All calls from the reactor's thread.

    Raises:
        FailedPreconditionError: workers cannot be confined here as the settings ask.
    """

    def __init__(self, reactor: Reactor, settings: WorkerSettings | None = None) -> None:
        self._reactor = reactor
        self._settings = settings or WorkerSettings()
        self._cells = Cells(self._settings)
        if not self._cells.own_users:  # which have shown that a worker's interpreter starts in bubblewrap
            launcher.probe(self._settings)
        if self._settings.confinement == "bubblewrap":
            launcher.sweep()
        #: What holds workers besides their namespaces, for the log.
        self.on_death: Callable[[str, str], None] = lambda _domain, _reason: None
        self.confinement: Mapping[str, str] = self._cells.report
        self._domains: dict[str, Domain] = {}
        self._arenas: dict[str, Arena] = {}
        self._spares: list[WorkerProcess] = []
        self._spare_timer: Timer | None = None
        self._starts = Starts(reactor)
        self._job_ids = count(1)
        self._closed = False
        self._all: set[WorkerProcess] = set()
        self._refill()

    # -- contract -----------------------------------------------------------------------------------------------------

    def allocate(self, tenant: str, size_bytes: int) -> ArenaBlock:
        return self._arena(tenant).allocate(size_bytes)

    def share(self, tenant: str, size_bytes: int) -> Region:
        return Region(tenant, size_bytes)

    def unshare(self, region: SharedRegion) -> None:
        assert isinstance(region, Region)  # made above
        for domain in self._domains.values():
            domain.forget(region)
        region.close()

    def load(self, domain: str, source: ModelSource, done: LoadDone) -> None:
        if source.format == LIBRARY and domain not in self._domains:
            problem = launcher.why_no_libraries(self._settings)
            if problem is not None:
                self._reactor.call_soon(lambda: done(problem))
                return
            self._domains[domain] = Domain(
                domain,
                shared=False,
                reactor=self._reactor,
                settings=self._settings,
                take=partial(self._launch_library, source),
                threads=1,  # libraries need not be safe for threads; and whose job ended the worker is certain
            )
        self._domain(domain).load(source, done)

    def unload(self, domain: str, key: str) -> None:
        if domain in self._domains:
            self._domains[domain].residents.unload(key)

    def measure(
        self,
        domain: str,
        key: str,
        shapes: Sequence[Sequence[int]],
        most_rows: int,
        done: MeasureDone,
    ) -> None:
        self._domain(domain).residents.measure(key, shapes, most_rows, done)

    def submit(self, job: Job, done: Done) -> _Handle:
        if job.operation not in _OPERATIONS:
            problem: RemoraError = InvalidArgumentError(f"workers have no operation {job.operation!r}")
            pending = PendingJob(next(self._job_ids), job, None, done)
            pending.finish(problem, self._reactor.call_soon)
            return _Handle(None, pending)
        arena = None if job.operation == "noop" else self._arena(job.tenant)
        pending = PendingJob(next(self._job_ids), job, arena, done)
        domain = self._domain(job.domain)
        domain.submit(pending)
        return _Handle(domain, pending)

    def submit_together(self, jobs: Sequence[tuple[Job, Done]]) -> list[_Handle]:
        domain = self._domain(jobs[0][0].domain)
        pending = [PendingJob(next(self._job_ids), job, self._arena(job.tenant), done) for job, done in jobs]
        domain.submit_together(pending)
        return [_Handle(domain, one) for one in pending]

    def slots(self, domain: str) -> int:
        # One more than run at once waits in the worker, so that no thread idles while the agent answers the last one.
        known = self._domains.get(domain)
        return self._settings.threads + 1 if known is None or known.slots > 1 else 1

    def release_domain(self, domain: str) -> None:
        libraries = [name for name in self._domains if name.startswith(library_domain(domain, ""))]
        for name in (domain, *libraries):
            known = self._domains.pop(name, None)
            if known is not None:
                known.close(CancelledError("the session that this job belonged to has ended"))
        arena = self._arenas.pop(domain, None)
        if arena is not None:
            for other in self._domains.values():
                other.forget(arena)
            arena.close()

    def workers(self) -> Sequence[WorkerInfo]:
        found = [self._info(domain.process, domain) for domain in self._domains.values() if domain.process is not None]
        return [*found, *(self._info(spare, None) for spare in self._spares)]

    def close(self) -> None:
        """Kill all workers and free everything; what was in flight is answered by the reactor's next turn."""
        if self._closed:
            return
        self._closed = True
        if self._spare_timer is not None:
            self._spare_timer.cancel()
        self._starts.close()
        for domain in self._domains.values():
            domain.close(UnavailableError("the agent is shutting down"))
        for process in self._all:
            process.kill("the agent is shutting down")
            process.wait()
        for arena in self._arenas.values():
            arena.close()
        self._cells.close()
        self._domains.clear()
        self._arenas.clear()
        self._spares.clear()
        self._all.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _arena(self, tenant: str) -> Arena:
        arena = self._arenas.get(tenant)
        if arena is None:
            arena = self._arenas[tenant] = Arena(tenant, self._settings.arena_bytes)
        return arena

    def _domain(self, name: str) -> Domain:
        domain = self._domains.get(name)
        if domain is None:
            domain = self._domains[name] = Domain(
                name,
                shared=name == SHARED,
                reactor=self._reactor,
                settings=self._settings,
                take=partial(self._take, name == SHARED),
            )
            domain.on_death = lambda reason: self.on_death(name, reason)
        return domain

    def _take(self, first: bool, again: Callable[[], None]) -> WorkerProcess | None:
        """Return a worker that belongs to nobody: the spare, or a new one; None if `again` is called in its turn."""
        self._spares = [spare for spare in self._spares if not spare.dead]
        if not self._spares and not self._starts.free:
            self._starts.wait(again, first=first)
            return None
        process = self._spares.pop(0) if self._spares else self._launch()
        if self._spare_timer is None and not self._closed:
            self._spare_timer = self._reactor.call_later(_SPARE_DELAY_S, self._refill)
        return process

    def _launch(self) -> WorkerProcess:
        return self._started(WorkerProcess(self._reactor, self._settings, self._cells.make))

    def _launch_library(self, source: ModelSource, again: Callable[[], None]) -> WorkerProcess | None:
        """Start a worker for one library, in its turn; its files are copied into it as it starts.

        Raises:
            NotFoundError: a file is gone.
        """
        if not self._starts.free:
            self._starts.wait(again)
            return None
        with ExitStack() as stack:
            files = []
            for path in (*(path for _digest, path in source.needs), source.path):
                try:
                    files.append(stack.enter_context(path.open("rb")).fileno())
                except OSError as error:
                    raise NotFoundError(f"a file of library {source.key} cannot be opened: {error.strerror}") from error
            return self._started(WorkerProcess(self._reactor, self._settings, self._cells.make, files))

    def _started(self, process: WorkerProcess) -> WorkerProcess:
        self._all = {known for known in self._all if not known.reaped}
        self._all.add(process)
        self._starts.began(process)
        return process

    def _refill(self) -> None:
        self._spare_timer = None
        self._spares = [spare for spare in self._spares if not spare.dead]
        while len(self._spares) < self._settings.standby:
            if not self._starts.free:
                self._starts.wait(self._refill)  # behind all who need a worker now
                return
            try:
                self._spares.append(self._launch())
            except RemoraError:
                return  # whoever needs a worker next meets the same error, and is told
            self._spares[-1].on_death = self._spare_died

    def _spare_died(self, _reason: str) -> None:
        """Start another spare: the agent is not healthy without a worker, and may be asked nothing until it is."""
        if self._spare_timer is None and not self._closed:
            self._spare_timer = self._reactor.call_later(self._settings.backoff_most_s, self._refill)

    @staticmethod
    def _info(process: WorkerProcess, domain: Domain | None) -> WorkerInfo:
        return WorkerInfo(
            id=process.id,
            pid=process.pid,
            domain=domain.name if domain is not None else "",
            backend=LIBRARY if domain is not None and f" {LIBRARY} " in domain.name else "onnx",
            models=domain.residents.names() if domain is not None else (),
            busy=len(domain.jobs) if domain is not None else 0,
            restarts=domain.restarts if domain is not None else 0,
            device=domain.residents.device() if domain is not None else "none",
            memory_bytes=memory_bytes(process.pid),
        )
