"""The two errors that users of vaccel-python catch, and how an agent's errors become them.

An errno travels in the first detail of an error status. Without details an application sees EIO, with details that
hold no errno EPROTO: the rules of vAccel's own client (reference: its `Error` handling in vaccel-rust).
"""

from __future__ import annotations

import errno

from remora.errors import RemoraError, UnavailableError
from remora.wire import vaccel
from remora.wire.protobuf import DecodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Tuple


class FFIError(RuntimeError):
    """An operation failed.

    Attributes:
        code: Linux errno.
        message: What failed; from this agent also what to do about it.
        status: (code, message) of a TensorFlow operation, None for any other.
    """

    def __init__(self, code: int, message: str, *, status: Optional[Tuple[int, str]] = None) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return f"[errno {self.code}] {errno.errorcode.get(self.code, 'unknown')}: {self.message}"


class NullPointerError(RuntimeError):
    """An object is used that is empty or was given back already."""

    def __init__(self, context: str) -> None:
        super().__init__(f"{context} is empty or was given back")
        self.context = context


def from_remote(error: RemoraError) -> FFIError:
    """Return what a vAccel application sees of an error."""
    if isinstance(error, UnavailableError):
        return FFIError(errno.ECONNRESET, str(error))
    if not error.details:
        return FFIError(errno.EIO, str(error))
    try:
        told = vaccel.Error.decode(error.details[0].value)
    except DecodeError:
        return FFIError(errno.EPROTO, str(error))
    status = None if told.status is None else (told.status.code, told.status.message)
    return FFIError(told.ffi_error or errno.EPROTO, str(error), status=status)
