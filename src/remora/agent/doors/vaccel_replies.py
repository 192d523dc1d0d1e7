"""How the vAccel door answers: sessions by number, and errors as vAccel's clients understand them.

A vAccel client reads the errno in the first detail of an error status and nothing else; without one its application
sees EIO. Statuses 3 and 12 mean "no such service or method" to a client that tries both service names, so an operation
that failed is never answered with them, but with 13 as upstream does.
"""

from __future__ import annotations

from collections.abc import Callable

from remora.agent.answers import Answer
from remora.agent.core import Core
from remora.agent.doors.calls import as_remora_error, run_for
from remora.agent.hints import is_hint
from remora.agent.operations import Operation
from remora.agent.peers import Peer
from remora.agent.sessions import Session
from remora.errors import InternalError, NotFoundError, RemoraError
from remora.wire import vaccel
from remora.wire.protobuf import Limits, Message
from remora.wire.ttrpc.calls import Call

NAME = "vaccel"
DECODE_LIMITS = Limits(max_depth=4, max_elements=8192)
EMPTY = vaccel.Empty()
#: INVALID_ARGUMENT, FAILED_PRECONDITION, UNIMPLEMENTED and DATA_LOSS are one thing to vAccel: the operation failed.
_AS_INTERNAL = (3, 9, 12, 15)

Reply = Callable[[Answer], None]


def with_errno(error: RemoraError, number: int | None = None) -> RemoraError:
    """Let the error carry an errno (its own, unless given), as vAccel's clients expect it."""
    error.details = vaccel.error_details(ffi_error=number or error.errno)
    return error


def with_status(error: RemoraError) -> RemoraError:
    """Let the error carry an errno and the status that a TensorFlow call returns beside it."""
    status = vaccel.Status(code=error.code, message=str(error))
    error.details = vaccel.error_details(
        ffi_error=error.errno, error_type=vaccel.ErrorType.FFI_WITH_STATUS, status=status
    )
    return error


def bad_value(text: str, kind: int = vaccel.ErrorType.CONVERSION_FAILED) -> RemoraError:
    """Return the error by which vAccel's agent answers a value that cannot be."""
    error = InternalError(text)
    error.details = vaccel.error_details(error_type=kind, status=vaccel.Status(message=text))
    return error


class BareError(Exception):
    """Carries an error that is answered without details, as upstream does for ids and services it does not know."""

    def __init__(self, error: RemoraError) -> None:
        super().__init__(str(error))
        self.error = error


class Replies:
    """What every part of the door needs to answer a call."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def respond(self, peer: Peer, call: Call, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        self.core.metrics.answered(NAME, call.method, peer.identity.tenant, "OK")
        call.respond(message, on_sent=on_sent)

    def fail(self, peer: Peer, call: Call, error: Exception, model: str = "") -> None:
        """Answer with an error: its own details, else its errno; a `BareError` has none."""
        if isinstance(error, BareError):
            known = sent = error.error
        else:
            known = as_remora_error(self.core, error)
            hints = [detail for detail in known.details if is_hint(detail)]
            if len(hints) == len(known.details):
                known.details = (*with_errno(known).details, *hints)  # its clients read the first
            sent = known
            if known.code in _AS_INTERNAL:
                sent = InternalError(known.message, fix=known.fix)
                sent.details = known.details
        if call.fail(sent):
            method = call.method if call.method in vaccel.METHODS else "unknown"
            self.core.refused(NAME, method, peer, known, model=model)

    def session(self, peer: Peer, number: int) -> Session:
        """Return the caller's session of that number.

        Raises:
            RemoraError: it cannot be one.
            BareError: there is none, or none of this caller's.
        """
        if number <= 0:
            raise bad_value(f"Invalid session id {number}", vaccel.ErrorType.INVALID_ARGUMENT)
        try:
            session = self.core.sessions.numbered(peer.identity, number)
        except NotFoundError as error:
            raise BareError(error) from error
        self.core.use_session(peer, session)
        return session

    def run(
        self,
        peer: Peer,
        call: Call,
        session: Session,
        operation: Operation,
        reply: Reply,
        fail: Callable[[RemoraError], None] | None = None,
    ) -> None:
        """Run an operation whose inputs lie in the call's memory, and answer the call."""
        self.core.metrics.received(peer.identity.tenant, operation.size_bytes)
        run_for(
            self.core,
            peer,
            call,
            session,
            operation,
            reply=reply,
            fail=fail or (lambda error: self.fail(peer, call, error, operation.model)),
        )
