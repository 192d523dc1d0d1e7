"""From an operation to its answer: idempotency, model, queue, worker, and back. The middle of the agent.

Everything here happens in the reactor's thread and nothing waits: each step is the callback of the one before. A run
ends in exactly one call of its `done`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from remora.agent.answers import OVERHEAD_BYTES, Answer, Answers, Flight, Waiter
from remora.agent.libraries import Libraries
from remora.agent.metrics import Metrics
from remora.agent.models import Models
from remora.agent.operations import COMPUTE, EXEC, Operation
from remora.agent.quotas import Quotas
from remora.agent.rules import Rules
from remora.agent.scheduler import Scheduler
from remora.agent.sessions import Session, Sessions
from remora.agent.tickets import Ticket, queue_full
from remora.agent.timings import Timings
from remora.agent.tuning import form_of
from remora.errors import CancelledError, DataLossError, NotFoundError, RemoraError, ResourceExhaustedError
from remora.workers.contract import SHARED, Job, JobHandle, ModelSpec, Result, Workers

#: How long an answer may take to come from a tenant's own worker: more than it says that it ran counts as run.
_WAY_US = 2000
#: How often a request may be sent again while it runs: each time one more may wait for it.
_MOST_WAITERS = 64


class Run:
    """One operation on its way."""

    __slots__ = (
        "cancelled",
        "device",
        "domain",
        "flight",
        "handle",
        "library",
        "operation",
        "release",
        "session",
        "ticket",
        "timings",
        "waiter",
    )

    def __init__(self, session: Session, operation: Operation, release: Callable[[], None], waiter: Waiter) -> None:
        self.session = session
        self.operation = operation
        #: Gives the memory of the inputs back; called when no worker can read it any more.
        self.release = release
        self.waiter = waiter
        self.flight: Flight | None = None
        self.ticket: Ticket | None = None
        self.domain = ""
        self.handle: JobHandle | None = None
        self.timings = Timings(time.monotonic())
        #: Where its model runs, once that is known.
        self.device = ""
        self.cancelled = False
        #: It keeps its library loaded.
        self.library = False


def _nobody(_outcome: Answer | RemoraError) -> None:
    """Stand in for the waiter of a run that is over."""


class Execution:
    """Runs operations for sessions."""

    def __init__(
        self,
        workers: Workers,
        models: Models,
        sessions: Sessions,
        scheduler: Scheduler,
        answers: Answers,
        metrics: Metrics,
        call_soon: Callable[[Callable[[], None]], None],
        libraries: Libraries,
        quotas: Quotas | None = None,
        queue_length: int = 256,
    ) -> None:
        """
        Args:
            queue_length: Requests of a tenant that wait for models to be loaded, unless its rules say otherwise.
        """
        self._quotas = quotas or Quotas(Rules(), time.monotonic)
        self._libraries = libraries
        #: Raised instead of beginning anything, while the agent drains.
        self.closed: Callable[[], RemoraError] | None = None
        self._workers = workers
        self._models = models
        self._sessions = sessions
        self._scheduler = scheduler
        self._answers = answers
        self._metrics = metrics
        self._call_soon = call_soon
        self._runs: dict[str, set[Run]] = {}  # by session
        self._queue_length = queue_length
        #: Requests of each tenant whose model is being loaded, given up or not.
        self._loading: Counter[str] = Counter()
        scheduler.together = self._start_together

    def run(self, session: Session, operation: Operation, release: Callable[[], None], done: Waiter) -> Run | None:
        """Run an operation; `done` gets the answer, which it must drop, or the error.

        Args:
            release: Called once, when the memory of the operation's inputs is free again.

        Returns:
            What `cancel` takes; None if the request joined one that runs, or was answered from memory.

        Raises:
            RemoraError: it cannot even start; then neither `done` nor `release` is called.
        """
        if not operation.request_id:
            run = Run(session, operation, release, done)
            self._begin(run)
            return run
        key = (session.id, operation.request_id)
        fingerprint = (operation.name, operation.model, operation.size_bytes)
        known = self._answers.look_up(session.tenant, key, fingerprint)
        if isinstance(known, Answer):
            release()
            done(known)
            return None
        if known is not None:
            if len(known.waiters) >= _MOST_WAITERS:
                raise ResourceExhaustedError(f"request {operation.request_id} was sent too often", fix="wait for it")
            release()
            known.waiters.append(done)
            return None
        flight = self._answers.begin(key, fingerprint)
        flight.waiters.append(done)
        run = Run(session, operation, release, lambda outcome: self._land(session, flight, outcome))
        run.flight = flight
        try:
            self._begin(run)
        except RemoraError:
            self._answers.end(session.tenant, flight, None)
            raise
        return run

    def _begin(self, run: Run) -> None:
        model = run.operation.model
        computes = run.operation.name == COMPUTE
        if self.closed is not None:
            raise self.closed()
        tenant = run.session.tenant
        terms = self._quotas.terms(run.session.owner, tenant)
        terms.check("operations", run.operation.name)
        executes = run.operation.name == EXEC
        if not computes and not executes:
            terms.check("models", model)
        self._quotas.admit(tenant, terms)
        # Arithmetic needs no model, and what a tenant makes it chew on must hold up nobody else's worker.
        domain = run.session.tenant
        if not computes:
            domain = (self._libraries if executes else self._models).domain_for(run.session, model)
        self._runs.setdefault(run.session.id, set()).add(run)
        try:
            if computes or (not executes and self._models.loaded(domain, model)):
                self._queue(run, domain)
                return
            if self._loading[tenant] >= (terms.share.queue or self._queue_length):
                raise queue_full(terms.share, self._queue_length, 1.0)
            self._loading[tenant] += 1
            try:
                if executes:
                    run.library = True
                    self._libraries.begin(run.session, model, lambda outcome: self._loaded(run, domain, outcome))
                else:
                    self._models.ensure(run.session, model, lambda outcome: self._loaded(run, domain, outcome))
            except RemoraError:
                self._load_ended(tenant)
                raise
        except RemoraError:
            self._remove(run)
            raise

    def _load_ended(self, tenant: str) -> None:
        self._loading[tenant] -= 1
        if not self._loading[tenant]:
            del self._loading[tenant]

    def _loaded(self, run: Run, domain: str, outcome: ModelSpec | RemoraError) -> None:
        self._load_ended(run.session.tenant)
        if run.cancelled:
            self._finish(run, CancelledError("the request was given up"))
            return
        if isinstance(outcome, RemoraError):
            self._finish(run, outcome)
            return
        try:
            self._queue(run, domain)
        except RemoraError as error:
            self._finish(run, error)

    @property
    def count(self) -> int:
        """How many requests run or wait."""
        return sum(map(len, self._runs.values()))

    def in_flight(self) -> Counter[str]:
        """Return how many requests run or wait, by identity."""
        sums: Counter[str] = Counter()
        for runs in self._runs.values():
            sums[next(iter(runs)).session.owner] += len(runs)
        return sums

    @property
    def idle(self) -> bool:
        """True if nothing runs or waits."""
        return not self._runs

    def _queue(self, run: Run, domain: str) -> None:
        terms = self._quotas.terms(run.session.owner, run.session.tenant)
        modelless = run.operation.name in (COMPUTE, EXEC)
        device = "cpu" if modelless else self._models.device(domain, run.operation.model)
        terms.check_device(device)
        self._quotas.admit_on(device, run.session.owner, terms)
        run.device, run.domain = device, domain
        run.ticket = ticket = Ticket(
            run.session.tenant,
            (domain, run.operation.model),
            lambda: self._start(run),
            lambda error: self._finish(run, error),
            run.operation.deadline_s,
            terms.share_on(device),
        )
        ticket.owner = run
        ticket.plan = self._models.plan(domain, run.operation)
        if ticket.plan.joins:
            ticket.form, ticket.rows = form_of(run.operation)
        self._scheduler.submit(ticket)

    def _start(self, run: Run) -> None:
        job = self._job(run)
        try:
            run.handle = self._workers.submit(job, lambda outcome: self._ended(run, outcome))
        except RemoraError as error:
            failure = error  # the except clause's own name is gone when the call is made
            self._call_soon(lambda: self._ended(run, failure))

    def _start_together(self, tickets: Sequence[Ticket]) -> None:
        runs = [ticket.owner for ticket in tickets if isinstance(ticket.owner, Run)]
        try:
            handles = self._workers.submit_together([(self._job(run), partial(self._ended, run)) for run in runs])
        except RemoraError as error:
            for run in runs:
                self._call_soon(partial(self._ended, run, error))
            return
        for run, handle in zip(runs, handles, strict=True):
            run.handle = handle

    @staticmethod
    def _job(run: Run) -> Job:
        """Return the job of a run that is handed to its worker now."""
        operation, timings, ticket = run.operation, run.timings, run.ticket
        timings.begun_s = time.monotonic()
        if ticket is not None and ticket.held_s:
            timings.batch_us = int((timings.begun_s - ticket.held_s) * 1e6)
        return Job(
            operation=operation.name,
            domain=run.domain,
            tenant=run.session.tenant,
            model=operation.model,
            inputs=operation.inputs,
            outputs=operation.outputs,
            image=operation.image,
            top=operation.top,
            deadline_s=operation.deadline_s,
            function=operation.function,
            numbers=operation.numbers,
            results=operation.results,
            region=operation.region,
            place=operation.place,
        )

    def _ended(self, run: Run, outcome: Result | RemoraError) -> None:
        timings, run_us, ticket = run.timings, 0, run.ticket
        timings.ended_s = time.monotonic()
        try:
            if isinstance(outcome, Result):
                timings.run_us = run_us = outcome.run_us
                timings.others_us = max(0, outcome.whole_us - run_us)
                answer = Answer(outcome, timings.queue_us)
                self._finish(run, answer)
                self._metrics.ran(
                    run.session.tenant,
                    run.operation.name,
                    run.operation.model,
                    timings,
                    device=run.device,
                    sent_bytes=answer.size_bytes - OVERHEAD_BYTES,
                )
                self._metrics.pods.ran(run.session.owner, timings)
            elif isinstance(outcome, NotFoundError | DataLossError):
                # Its worker has died, and the next one may have had to give the model up: the next job loads it anew.
                self._models.lost(run.domain, run.operation.model, outcome, partial(self._finish, run, outcome))
            else:
                self._finish(run, outcome)
        finally:  # whatever became of the answer, the slot is free
            if ticket is not None:
                measured = isinstance(outcome, Result)
                # What failed or was given up has used its time, too: else that would be the way around a share.
                part = ticket.rows / ticket.turn.rows if ticket.turn is not None else 1.0
                took_us = int((timings.ended_s - timings.begun_s) * 1e6 * part)
                used_us = run_us if measured else took_us
                if measured and run.domain != SHARED:  # who has taken a worker of its own over says what it likes
                    used_us = max(run_us, took_us - _WAY_US)
                tenant, key = run.session.tenant, run.session.owner
                self._quotas.charge(tenant, self._quotas.terms(key, tenant), used_us, device=run.device, key=key)
                self._scheduler.finished(ticket, used_us, measured=measured)

    def _finish(self, run: Run, outcome: Answer | RemoraError) -> None:
        self._remove(run)
        waiter = run.waiter
        # Each of these leads back to the run: without them its tensors go now, and not when the collector comes.
        run.ticket = run.handle = run.flight = None
        run.waiter = _nobody
        try:
            waiter(outcome)
        finally:
            run.release()  # after the answer is on its way: clearing the memory takes a while

    def _remove(self, run: Run) -> None:
        if run.library:
            run.library = False
            self._libraries.finish(run.session, run.operation.model)
        runs = self._runs.get(run.session.id)
        if runs is not None:
            runs.discard(run)
            if not runs:
                del self._runs[run.session.id]

    def _land(self, session: Session, flight: Flight, outcome: Answer | RemoraError) -> None:
        """Answer everyone who waits for a request with a key."""
        answer = outcome if isinstance(outcome, Answer) else None
        keep = answer if not session.ended else None
        self._answers.end(session.tenant, flight, keep)
        waiters, flight.waiters = flight.waiters, []
        for waiter in waiters:
            waiter(answer.take() if answer is not None else outcome)
        if answer is not None:
            answer.drop()

    # -- giving up --------------------------------------------------------------------------------------------------

    def cancel(self, run: Run) -> None:
        """Nobody waits for this run any more: its connection is gone.

        One that can be sent again goes on if it is with a worker already; a client that comes back finds its answer.
        """
        if run.flight is not None:
            if len(run.flight.waiters) == 1 and run.ticket is not None and self._scheduler.cancel(run.ticket):
                self._finish(run, CancelledError("the request was given up while it waited"))
            return
        self._stop(run)

    def session_ended(self, session: Session) -> None:
        """Stop everything the session still runs."""
        for run in list(self._runs.get(session.id, ())):
            self._stop(run)
        self._answers.forget_session(session.tenant, session.id)

    def _stop(self, run: Run) -> None:
        if run.cancelled:
            return
        run.cancelled = True
        if run.ticket is None:
            return  # its model is being loaded: dropped when that ends
        if self._scheduler.cancel(run.ticket):
            self._finish(run, CancelledError("the request was given up while it waited"))
        elif run.handle is not None:
            run.handle.cancel()
