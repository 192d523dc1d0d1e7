"""One trust domain's worker, kept alive: what it should have loaded, what it runs, and what happens when it dies.

The state that matters (which models, which jobs) is here and not in the process, so a new process is brought to where
the old one was. Jobs wait here only while there is no process, while it loads or maps what they need, or for a suspect:
what was in flight when a worker died runs by itself the second time, so that no job takes others along twice.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    ProtocolError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
)
from remora.reactor import Reactor, Timer
from remora.workers.arena import SharedMemory, aligned
from remora.workers.blame import Blame
from remora.workers.contract import ModelSource, Result
from remora.workers.jobs import MODELLESS, PendingJob
from remora.workers.process import WorkerProcess
from remora.workers.protocol import Message, error_of, pack, whole
from remora.workers.residents import LoadDone, Residents
from remora.workers.settings import WorkerSettings

_MOST_US = 1 << 40
#: A worker that lived this long did not die of how it starts: the next one starts without delay.
_HEALTHY_S = 10.0
_FAILED_STARTS = 3
#: A catalogue's model ends by itself: so long a worker that answers others is left alone with a run that nobody wants.
_SHARED_GRACE_S = 10.0
_MOST_SIZES = 1024


class Domain:
    """Runs the jobs of one trust domain on one worker at a time."""

    def __init__(
        self,
        name: str,
        *,
        shared: bool,
        reactor: Reactor,
        settings: WorkerSettings,
        take: Callable[[Callable[[], None]], WorkerProcess | None],
        threads: int = 0,
    ) -> None:
        """
        Args:
            take: Returns a worker; None if it is another's turn to start, and calls what it is given when it is ours.
        """
        self.name = name
        #: Jobs that its worker runs at once.
        self.slots = threads or settings.threads
        self.process: WorkerProcess | None = None
        self.jobs: dict[int, PendingJob] = {}
        self.waiting: deque[PendingJob] = deque()
        self.restarts = 0
        self.on_death: Callable[[str], None] = lambda _reason: None
        self._shared = shared
        self._reactor = reactor
        self._settings = settings
        self._take = take
        self.residents = Residents(reactor, settings, self._model_gone, self._advance)
        self._arenas: dict[int, bool] = {}  # id -> mapped by the worker
        self._sizes: dict[tuple[object, ...], int] = {}
        self._backoff_s = 0.0
        self._failed_starts = 0
        self._restart: Timer | None = None
        self._queued = False  # for its turn to start a worker
        self._deadline: Timer | None = None
        self._blameless = False
        self._blame = Blame()
        self._answered_s = 0.0  # when the worker last answered a job

    def load(self, source: ModelSource, done: LoadDone) -> None:
        self.residents.want(source, done)

    def _model_gone(self, key: str, error: RemoraError) -> None:
        for pending in [job for job in self.waiting if job.job.model == key]:
            self.waiting.remove(pending)
            pending.finish(error, self._reactor.call_soon)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def submit(self, pending: PendingJob) -> None:
        if not self._accept(pending):
            return
        if self.waiting or self._kept_apart(pending) or not self._start(pending):
            self.waiting.append(pending)
            self._advance()

    def submit_together(self, jobs: Sequence[PendingJob]) -> None:
        """Send jobs as one; those that cannot start yet wait, and then run by themselves."""
        datagrams = []
        for pending in jobs:
            if not self._accept(pending):
                continue
            data = None if self.waiting or self._kept_apart(pending) else self._datagram(pending)
            if data is None:
                self.waiting.append(pending)
            elif data:
                self.jobs[pending.id] = pending
                datagrams.append(data)
        for data in pack(datagrams):
            if self.process is not None:
                self.process.send_job(data)
        if self.waiting:
            self._advance()

    def _accept(self, pending: PendingJob) -> bool:
        """Begin to watch a job's deadline; False if it was answered at once."""
        problem = self._blame.refusal(pending.job.tenant, time.monotonic())
        if pending.job.operation not in MODELLESS and self.residents.get(pending.job.model) is None:
            problem = NotFoundError(f"model {pending.job.model} is not loaded", fix="load it first")
        if problem is not None:
            pending.finish(problem, self._reactor.call_soon)
            return False
        deadline_s = pending.job.deadline_s
        if deadline_s is not None and (self._deadline is None or deadline_s < self._deadline.when_s):
            self._watch(deadline_s)
        return True

    def _watch(self, deadline_s: float) -> None:
        """Look for late jobs then: one timer for all, since nearly every job ends long before its deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._reactor.call_later(max(0.0, deadline_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._deadline = None
        now_s, next_s = time.monotonic(), math.inf
        for pending in [*self.jobs.values(), *self.waiting]:
            deadline_s = pending.job.deadline_s
            if deadline_s is None or pending.error is not None:
                continue
            if deadline_s <= now_s:
                self.give_up(pending, DeadlineExceededError("the deadline passed before the job was done"))
            else:
                next_s = min(next_s, deadline_s)
        if next_s < math.inf:
            self._watch(next_s)

    def give_up(self, pending: PendingJob, error: RemoraError) -> None:
        """Cancel a job: at once while it waits, else when its worker lets go of it or is killed."""
        if pending.done is None or pending.error is not None:
            return
        pending.error = error
        if pending.id not in self.jobs or self.process is None:
            if pending in self.waiting:
                self.waiting.remove(pending)
            pending.finish(error, self._reactor.call_soon)
            return
        process = self.process
        process.tell({"t": "cancel", "id": pending.id})
        self._kill_later(process, pending, time.monotonic() + _SHARED_GRACE_S)

    def _kill_later(self, process: WorkerProcess, pending: PendingJob, latest_s: float) -> None:
        grace_s = self._settings.stop_grace_s
        pending.grace = self._reactor.call_later(grace_s, lambda: self._kill_for(process, pending, latest_s))

    def _kill_for(self, process: WorkerProcess, pending: PendingJob, latest_s: float) -> None:
        """End a worker because of a job that does not stop, but no shared one that goes on answering others."""
        if pending.done is None or self.process is not process:
            return
        now_s = time.monotonic()
        if self._shared and now_s < latest_s and now_s - self._answered_s < self._settings.stop_grace_s:
            self._kill_later(process, pending, latest_s)
            return
        if self._shared:
            self._blame.note(pending.job.tenant, now_s)
        self._blameless = True
        process.kill("a job did not stop when it was told to")

    def _kept_apart(self, pending: PendingJob) -> bool:
        """True if a job must wait until the worker is idle, or until a suspect has left it."""
        if not self.jobs:
            return False
        return pending.attempts > 0 or (len(self.jobs) == 1 and next(iter(self.jobs.values())).attempts > 0)

    def _start(self, pending: PendingJob) -> bool:
        """Hand a job to the worker; False if something that it needs is not there yet."""
        data = self._datagram(pending)
        if data and self.process is not None:
            self.jobs[pending.id] = pending
            self.process.send_job(data)
        return data is not None

    def _datagram(self, pending: PendingJob) -> bytes | None:
        """Return the message for the worker; None if something is not there yet, empty if the job has failed."""
        process = self.process
        if process is None or not process.ready or process.dead or process.leaving:
            return None
        spec, number = None, 0
        if pending.region is not None and pending.region.closed:
            gone = UnavailableError("the connection whose memory the tensors lie in has ended")
            pending.finish(gone, self._reactor.call_soon)
            return b""
        for memory in (pending.arena, pending.region):
            if memory is not None and not self._mapped(memory):
                return None
        if pending.job.operation not in MODELLESS:
            model = self.residents.get(pending.job.model)
            if model is None or model.state != "loaded":
                return None
            spec, number = model.spec, model.number
        try:
            return pending.datagram(spec, number, self._sizes.get(pending.form, 0))
        except RemoraError as error:
            pending.finish(error, self._reactor.call_soon)
            return b""

    def _mapped(self, arena: SharedMemory) -> bool:
        mapped = self._arenas.get(arena.id)
        if mapped is None and self.process is not None:
            self._arenas[arena.id] = False
            self.process.tell({"t": "arena", "id": arena.id, "size": arena.size}, os.dup(arena.fd))
        return bool(mapped)

    def forget(self, arena: SharedMemory) -> None:
        """Have the worker unmap an arena or a region, once nothing of it is in use there."""
        if self._arenas.pop(arena.id, None) is not None and self.process is not None:
            self.process.tell({"t": "drop", "id": arena.id})

    def _answered(self, message: Message) -> None:
        pending = self.jobs.get(whole(message.get("id"), "job", 1 << 62))
        if pending is None:
            raise ProtocolError("the worker answered a job that it does not have")
        self._answered_s = time.monotonic()
        if message["t"] == "need":
            self._need(pending, whole(message.get("len"), "size", 1 << 50))
            return
        run_us = whole(message.get("us"), "time", _MOST_US)
        outcome: Result | RemoraError
        if message["t"] == "failed":
            outcome = error_of(message.get("error"))
        else:
            model = self.residents.get(pending.job.model)
            outcome = pending.result(message, model.source if model is not None else None, run_us)
        del self.jobs[pending.id]
        if isinstance(outcome, Result) and "all" in message:
            outcome.whole_us = whole(message["all"], "time", _MOST_US)
        if isinstance(outcome, Result) and outcome.outputs and not pending.sized:
            self._remember_size(pending, outcome)
        if pending.error is not None:
            if isinstance(outcome, Result):
                outcome.release()
            outcome = pending.error
        pending.finish(outcome)
        if self.waiting:
            self._advance()

    def _remember_size(self, pending: PendingJob, result: Result) -> None:
        """The next job of this form gets a block of the right size at once."""
        if len(self._sizes) >= _MOST_SIZES:
            self._sizes.clear()
        self._sizes[pending.form] = sum(aligned(len(output.data)) for output in result.outputs)

    def _need(self, pending: PendingJob, size_bytes: int) -> None:
        """Answer a worker that found the outputs to be larger than their block."""
        if pending.block is None:
            raise ProtocolError("the worker asked for memory that the job has no use for")
        arena = offset = length = 0
        if size_bytes <= self._settings.output_bytes:
            try:
                block = pending.grow(size_bytes)
            except ResourceExhaustedError:
                pass  # the worker is told so, and fails the job with the size that it needs
            else:
                arena, offset, length = block.arena.id, block.offset, block.size
        if self.process is not None:
            self.process.tell({"t": "block", "id": pending.id, "b": arena, "off": offset, "len": length})

    # -- the process --------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what can be done now: start a process, load what is wanted, hand out jobs in order."""
        process = self.process
        if process is None:
            if self._restart is None and not self._queued and (self.waiting or self.residents):
                self._restart = self._reactor.call_later(self._backoff_s, self._launch)
            return
        if not process.ready:
            return
        self.residents.send_wanted(process)
        waiting, self.waiting = self.waiting, deque()
        while waiting:
            pending = waiting.popleft()
            if self._kept_apart(pending):
                self.waiting.append(pending)
                break  # and nobody overtakes it, or it would wait for ever
            if not self._start(pending):
                self.waiting.append(pending)
        self.waiting.extend(waiting)

    def _launch(self) -> None:
        self._restart, self._queued = None, False
        if not self.waiting and not self.residents:
            return  # what needed a worker has gone meanwhile
        try:
            process = self._take(self._launch)
        except RemoraError as error:
            self._fail_all(error)
            return
        if process is None:
            self._queued = True
            return
        self.process = process
        process.on_message = self._message
        process.on_death = lambda reason: self._died(process, reason)
        process.on_ready = lambda: self._assign(process)
        if process.ready:
            self._assign(process)

    def _assign(self, process: WorkerProcess) -> None:
        self._failed_starts = 0
        settings, device, threads = self._settings, self._settings.device, self.slots
        memory = settings.shared_memory_bytes if self._shared else settings.tenant_memory_bytes
        if self._shared:
            process.bound(settings.shared_bound_bytes, 0.0)
        else:
            process.bound(memory, settings.tenant_cpus)
        process.tell({"t": "assign", "memory": memory, "threads": threads, "device": device})
        self._advance()

    def _message(self, message: Message) -> None:
        kind = message["t"]
        if kind in ("done", "failed", "need"):
            self._answered(message)
        elif kind in ("loaded", "refused"):
            self.residents.loaded(message)
        elif kind == "measured":
            self.residents.measured(message)
        elif kind == "arena":
            if self._arenas.get(whole(message.get("id"), "arena", 1 << 62)) is False:
                self._arenas[message["id"]] = True
                self._advance()
        else:
            raise ProtocolError(f"the worker sent an unknown message {kind[:40]!r}")

    def _died(self, process: WorkerProcess, reason: str) -> None:
        if self.process is not process:
            return
        self.process = None
        self._arenas.clear()
        self.restarts += 1
        if not process.ready:
            self._failed_starts += 1
        lived_s = time.monotonic() - process.started_s
        first, most = self._settings.backoff_first_s, self._settings.backoff_most_s
        self._backoff_s = 0.0 if lived_s > _HEALTHY_S or self._blameless else min(most, max(first, 2 * self._backoff_s))
        self.on_death(reason)
        blamed, self._blameless = not self._blameless, False
        in_flight, self.jobs = list(self.jobs.values()), {}
        survivors = []
        for pending in in_flight:
            error = pending.verdict(reason, blamed=blamed)
            if error is None:
                survivors.append(pending)
            else:
                if self._shared and blamed and pending.error is None and len(in_flight) == 1:
                    self._blame.note(pending.job.tenant, time.monotonic())
                pending.finish(error, self._reactor.call_soon)
        self.waiting.extendleft(reversed(survivors))
        self.residents.died(reason)
        if self._failed_starts >= _FAILED_STARTS:
            self._failed_starts = 0
            fix = "see the agent's log; `bwrap` and the Python packages of remora[node] must work for this user"
            self._fail_all(FailedPreconditionError(f"workers do not start: {reason}", fix=fix))
        elif survivors or self.residents or self.waiting:
            self._advance()

    def _fail_all(self, error: RemoraError) -> None:
        self.residents.fail_waiters(error)
        waiting, self.waiting = self.waiting, deque()
        for pending in waiting:
            pending.finish(error, self._reactor.call_soon)

    def close(self, error: RemoraError) -> None:
        """Kill the worker and answer whatever is in flight."""
        process, self.process = self.process, None
        for timer in (self._restart, self._deadline):
            if timer is not None:
                timer.cancel()
        if process is not None:
            process.kill("it was closed")
        in_flight, self.jobs = self.jobs, {}
        for pending in in_flight.values():
            pending.finish(pending.error or error, self._reactor.call_soon)
        self._fail_all(error)
        self.residents.clear()
