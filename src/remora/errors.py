"""The one error tree.

Everything Remora raises on purpose is a `RemoraError`. Each class carries the four numbers by which the outside
world knows it (ttrpc/gRPC status, HTTP status, vAccel errno, exit status), so that a door or a command translates an
error by looking at it and never by a table of its own.

Standard library only, Python 3.9: the guest imports this module.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs the guest more than this whole module
    from typing import Any, Dict, Optional, Tuple, Type


class RemoraError(Exception):
    """Base of all errors that Remora raises on purpose.

    The message says what was asked, what was wrong, and what is allowed; `fix` says what to do about it.
    """

    #: google.rpc code, as ttrpc and gRPC carry it.
    code: int = 13
    http_status: int = 500
    #: Linux errno, as vAccel carries it.
    errno: int = 71
    exit_status: int = 1
    #: True if the same request may succeed when it is sent again, unchanged.
    retryable: bool = False
    #: What a peer attached to its error status: `wire.ttrpc.messages.Any` values, which this module must not know.
    details: Tuple[Any, ...] = ()

    def __init__(self, message: str, *, fix: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


class InternalError(RemoraError):
    """A fault of Remora's own. The agent's log has the details."""


class CancelledError(RemoraError):
    """The caller gave the request up."""

    code, http_status, errno, exit_status = 1, 499, 125, 130


class InvalidArgumentError(RemoraError):
    """The request itself is wrong; sending it again cannot help."""

    code, http_status, errno, exit_status = 3, 400, 22, 2


class DeadlineExceededError(RemoraError):
    """The deadline passed before the answer was ready."""

    code, http_status, errno, exit_status = 4, 504, 110, 124


class NotFoundError(RemoraError):
    """No such thing, or none that the caller may know of."""

    code, http_status, errno, exit_status = 5, 404, 2, 3


class AlreadyExistsError(RemoraError):
    """The name is taken."""

    code, http_status, errno, exit_status = 6, 409, 17, 4


class PermissionDeniedError(RemoraError):
    """Policy forbids it; the message names the rule."""

    code, http_status, errno, exit_status = 7, 403, 13, 5


class ResourceExhaustedError(RemoraError):
    """A limit or quota is reached; the message names it."""

    code, http_status, errno, exit_status, retryable = 8, 429, 11, 6, True


class FailedPreconditionError(RemoraError):
    """The system is not in the state that the request needs; `fix` says how to get there."""

    code, http_status, errno, exit_status = 9, 412, 22, 7


class AbortedError(RemoraError):
    """Interrupted by something else; the request may be sent again."""

    code, http_status, errno, exit_status, retryable = 10, 409, 11, 8, True


class UnimplementedError(RemoraError):
    """This version does not offer the operation; the message names it."""

    code, http_status, errno, exit_status = 12, 501, 95, 9


class UnavailableError(RemoraError):
    """The peer cannot be reached now."""

    code, http_status, errno, exit_status, retryable = 14, 503, 111, 10, True


class DataLossError(RemoraError):
    """Stored bytes do not have the digest they are named by."""

    code, http_status, errno, exit_status = 15, 500, 5, 11


class UnauthenticatedError(RemoraError):
    """The caller's identity could not be established."""

    code, http_status, errno, exit_status = 16, 401, 13, 12


class ProtocolError(RemoraError):
    """The peer sent bytes that break the protocol. The connection cannot go on."""

    code, http_status, errno, exit_status = 3, 400, 71, 13


_BY_CODE: Dict[int, Type[RemoraError]] = {
    cls.code: cls
    for cls in (
        CancelledError,
        InvalidArgumentError,
        DeadlineExceededError,
        NotFoundError,
        AlreadyExistsError,
        PermissionDeniedError,
        ResourceExhaustedError,
        FailedPreconditionError,
        AbortedError,
        UnimplementedError,
        InternalError,
        UnavailableError,
        DataLossError,
        UnauthenticatedError,
    )
}


def from_code(code: int, message: str) -> RemoraError:
    """Return the error for a google.rpc status code; an unknown code is an `InternalError`."""
    return _BY_CODE.get(code, InternalError)(message)
