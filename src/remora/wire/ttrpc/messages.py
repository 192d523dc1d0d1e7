"""The envelopes of ttrpc, and how Remora's errors travel in them.

Field numbers: https://github.com/containerd/ttrpc/blob/main/request.proto; Status and Any are google.rpc.Status and
google.protobuf.Any.
"""

from __future__ import annotations

from remora.errors import RemoraError, from_code
from remora.wire.protobuf import Limits, Message, bytes_, int32, int64, string
from remora.wire.protobuf import message as message_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Sequence

#: An envelope holds few things; what is in its payload has its own limits.
ENVELOPE_LIMITS = Limits(max_depth=4, max_elements=1024)


class KeyValue(Message):
    key: str = string(1)
    value: str = string(2)


class Request(Message):
    service: str = string(1)
    method: str = string(2)
    payload: bytes | memoryview = bytes_(3)
    #: 0: no deadline.
    timeout_nano: int = int64(4)
    #: A key may occur several times.
    metadata: list[KeyValue] = message_(5, KeyValue, repeated=True)


class Any(Message):
    type_url: str = string(1)
    value: bytes = bytes_(2)


class Status(Message):
    #: google.rpc.Code.
    code: int = int32(1)
    message: str = string(2)
    details: list[Any] = message_(3, Any, repeated=True)


class Response(Message):
    #: Absent, or with code 0: success.
    status: Status | None = message_(1, Status)
    payload: bytes | memoryview = bytes_(2)


def status_of(error: RemoraError, details: Sequence[Any] = ()) -> Status:
    """Return the status that tells a peer of `error`; details default to those that came with it."""
    return Status(code=error.code, message=str(error), details=list(details or error.details))


def error_of(status: Status) -> RemoraError:
    """Return the error that a peer's status stands for, its details attached."""
    error = from_code(status.code, status.message)
    error.details = tuple(status.details)
    return error
