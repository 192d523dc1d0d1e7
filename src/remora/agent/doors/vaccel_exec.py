"""vAccel's EXEC and EXEC_WITH_RESOURCE: a function of a library that the guest has uploaded.

Upstream's agent loads any library of its host into itself. Here the library is bytes of the guest's own, named by the
resource's number or by digest, and runs in a confined worker, if policy allows it (`exec`, `libraries`). Layouts are
those of vAccel's genop: library, symbol, then whatever the function reads; it may write to every write argument.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.bundles import Bundles
from remora.agent.core import Core
from remora.agent.doors.vaccel_replies import BareError, bad_value, with_errno
from remora.agent.operations import Operation
from remora.agent.sessions import Session
from remora.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError, RemoraError
from remora.wire import vaccel
from remora.wire.vaccel_enums import ArgType

Args = Sequence[vaccel.GenopArg]
Prepared = tuple[Operation, Callable[[Answer], list[bytes | memoryview]]]
_EPERM, _ENOSYS, _EPROTO = 1, 38, 71
_ABORTED, _UNIMPLEMENTED = 10, 12


def explain(error: RemoraError) -> RemoraError:
    """Let a failed call carry the errno that vAccel's exec plugin has for it."""
    # A symbol that is missing; a library that took its worker with it, which sending again does not change.
    numbers = {_UNIMPLEMENTED: _ENOSYS, _ABORTED: _EPROTO}
    return error if error.details else with_errno(error, numbers.get(error.code))


class ExecCalls:
    """Turns the two operations' arguments into an operation."""

    def __init__(self, core: Core, bundles: Bundles) -> None:
        self._core = core
        self._bundles = bundles

    def by_name(self, session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
        """Return what EXEC asks for, and what makes the write arguments of its answer.

        Raises:
            RemoraError: policy forbids it, or the arguments are not those of the operation.
        """
        return self._prepare(session, self._of_name, read, write, deadline_s)

    def by_resource(self, session: Session, read: Args, write: Args, deadline_s: float) -> Prepared:
        """Return what EXEC_WITH_RESOURCE asks for.

        Raises:
            RemoraError: as `by_name`.
            BareError: there is no such resource.
        """
        return self._prepare(session, self._of_resource, read, write, deadline_s)

    def _prepare(
        self,
        session: Session,
        library: Callable[[Session, vaccel.GenopArg], tuple[str, ...]],
        read: Args,
        write: Args,
        deadline_s: float,
    ) -> Prepared:
        self._allowed(session, ())
        if len(read) < 2:
            raise InvalidArgumentError(
                f"EXEC takes a library and a symbol, then any arguments; {len(read)} read arguments were sent"
            )
        digests = library(session, read[0])
        self._allowed(session, digests)
        symbol = _text(read[1], "the symbol")
        try:
            key = self._core.libraries.key(session, digests)
        except NotFoundError as error:
            raise with_errno(error) from error
        operation = operations.execute(
            key, symbol, [_argument(arg) for arg in read[2:]], [_argument(arg) for arg in write], deadline_s=deadline_s
        )
        return operation, lambda answer: [output.data for output in answer.result.outputs]

    def _allowed(self, session: Session, digests: Sequence[str]) -> None:
        try:
            self._core.libraries.check(session, digests)
        except PermissionDeniedError as error:
            raise with_errno(error, _EPERM) from error

    def _of_resource(self, session: Session, arg: vaccel.GenopArg) -> tuple[str, ...]:
        if arg.arg_type != ArgType.INT64 or len(arg.buf) != 8:
            raise InvalidArgumentError("the library's resource is no INT64", fix="send the number of a resource")
        (number,) = struct.unpack("<q", arg.buf)
        if number <= 0:
            raise bad_value(f"Invalid resource id {number}", vaccel.ErrorType.INVALID_ARGUMENT)
        try:
            bundle = self._bundles.find(session.tenant, number)
        except NotFoundError as error:
            raise BareError(error) from error
        if bundle.kind != vaccel.ResourceType.LIB:
            raise InvalidArgumentError(
                f"resource {number} is not a library", fix="register it with the resource type LIB"
            )
        if session.id not in bundle.sessions:
            text = f"resource {number} is not registered with session {session.number}"
            raise with_errno(PermissionDeniedError(text, fix="register it with this session first"), _EPERM)
        return bundle.digests

    @staticmethod
    def _of_name(_session: Session, arg: vaccel.GenopArg) -> tuple[str, ...]:
        name = _text(arg, "the library")
        if not operations.is_digest(name):
            raise with_errno(
                PermissionDeniedError(
                    f"EXEC names {name[:100]!r}, and the agent loads no library of its host for a guest",
                    fix="register the library as a resource and use EXEC_WITH_RESOURCE, or name its sha256: digest",
                ),
                _EPERM,
            )
        return (operations.check_digest(name),)


def _text(arg: vaccel.GenopArg, what: str) -> str:
    data = bytes(arg.buf)
    if arg.arg_type != ArgType.STRING or data[-1:] != b"\0" or b"\0" in data[:-1]:
        raise InvalidArgumentError(f"{what} is no STRING", fix="send text with one NUL, at its end")
    try:
        return data[:-1].decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{what} is no UTF-8 text") from error


def _argument(arg: vaccel.GenopArg) -> operations.Argument:
    return operations.Argument(memoryview(arg.buf), arg.arg_type, arg.custom_type_id)
