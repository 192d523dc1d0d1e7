"""What the doors have in common: running an operation for a call, and answering for its failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from remora.agent.answers import Answer
from remora.agent.core import Core
from remora.agent.execution import Run
from remora.agent.operations import Operation
from remora.agent.peers import Peer
from remora.agent.refusals import code_name
from remora.agent.sessions import Session
from remora.agent.tracing import Trace
from remora.errors import DeadlineExceededError, InternalError, RemoraError
from remora.wire import remora_v1, vaccel

#: How logs and metrics name the door of a ttrpc service.
_DOORS = {remora_v1.SERVICE: "native", **dict.fromkeys(vaccel.SERVICES, "vaccel")}
#: Answers a call with a finished operation's answer; it must see to it that the answer is dropped.
Reply = Callable[[Answer], None]
#: Answers a call with an error.
Fail = Callable[[RemoraError], None]


class Request(Protocol):
    """What running needs of a request: a ttrpc `Call`, or a `web.exchange.Exchange`."""

    service: str
    method: str

    def header(self, name: str) -> str: ...

    def retain(self) -> None: ...

    def release(self) -> None: ...

    def on_cancel(self, callback: Callable[[RemoraError], None]) -> None: ...


def run_for(
    core: Core, peer: Peer, call: Request, session: Session, operation: Operation, *, reply: Reply, fail: Fail
) -> None:
    """Run an operation whose inputs lie in the call's memory; exactly one of `reply` and `fail` follows, or is over."""
    run: Run | None = None
    over = False
    trace = core.tracer.begin(call) if core.tracer is not None else None

    def traced(error: Exception | None = None) -> None:
        if trace is not None:
            _end_trace(trace, call, session, operation, run, error)

    def done(outcome: Answer | RemoraError) -> None:
        nonlocal over
        was_over, over = over, True
        if run is not None:
            peer.remove_run(run)
        if isinstance(outcome, Answer):
            if was_over:
                outcome.drop()
                return
            try:
                reply(outcome)
            except Exception as error:  # noqa: BLE001 - the border of a call: the caller gets an answer in any case
                outcome.drop()
                fail(as_remora_error(core, error))
                traced(error)
            else:
                traced()
        elif not was_over:
            fail(outcome)
            traced(outcome)

    call.retain()
    try:
        run = core.execution.run(session, operation, call.release, done)
    except RemoraError as error:
        call.release()
        fail(error)
        traced(error)
        return
    except BaseException:
        call.release()
        raise
    if over or run is None:
        if not over:
            call.on_cancel(lambda reason: _note(core, peer, call, operation.model, reason))
        return
    started = run
    peer.add_run(started)

    def cancelled(reason: RemoraError) -> None:
        nonlocal over
        if not over:
            over = True  # answered by the connection, or beyond answering
            _note(core, peer, call, operation.model, reason)
            traced(reason)
            core.execution.cancel(started)

    call.on_cancel(cancelled)


def _end_trace(
    trace: Trace, call: Request, session: Session, operation: Operation, run: Run | None, error: Exception | None
) -> None:
    code = "" if error is None else code_name(error) if isinstance(error, RemoraError) else "INTERNAL"
    trace.end(
        door=_DOORS.get(call.service, call.service),
        method=call.method,
        operation=operation.name,
        model=operation.model,
        tenant=session.tenant,
        session=session.id,
        received_bytes=operation.size_bytes,
        timings=run.timings if run is not None else None,
        code=code,
        error=error.message if isinstance(error, RemoraError) else "",
    )


def _note(core: Core, peer: Peer, call: Request, model: str, reason: RemoraError) -> None:
    if isinstance(reason, DeadlineExceededError):
        core.refused(_DOORS.get(call.service, call.service), call.method, peer, reason, model=model)


def as_remora_error(core: Core, error: Exception) -> RemoraError:
    """Return what the caller may know of any exception; a fault of our own is told to the log alone."""
    if isinstance(error, RemoraError):
        return error
    core.reactor.on_error(error)
    failure = InternalError("the agent failed on this request", fix="ask the operator for the agent's log")
    failure.__cause__ = error
    return failure
