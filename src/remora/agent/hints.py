"""When a refused request is worth sending again: google.rpc.RetryInfo, and the same in words.

Format: https://github.com/googleapis/googleapis/blob/master/google/rpc/error_details.proto
"""

from __future__ import annotations

from remora.errors import RemoraError
from remora.wire.protobuf import Message, int32, int64, message
from remora.wire.ttrpc.messages import Any as AnyMessage

TYPE_URL = "type.googleapis.com/google.rpc.RetryInfo"
#: HTTP statuses of what is refused only now: too many requests, unavailable.
_FOR_NOW = (429, 503)
_SOON_S = 1.0


class Duration(Message):
    seconds: int = int64(1)
    nanos: int = int32(2)


class RetryInfo(Message):
    retry_delay: Duration = message(1, Duration)


def with_retry(error: RemoraError, after_s: float) -> RemoraError:
    """Let the error say when the request is worth sending again."""
    after_s = max(0.001, after_s)
    error.fix = f"try again in {after_s:.3g} s" + (f"; {error.fix}" if error.fix else "")
    error.details = (hint(after_s),)
    return error


def hint(after_s: float) -> AnyMessage:
    """Return the detail that says when."""
    nanos = round(after_s * 1e9)
    info = RetryInfo(retry_delay=Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))
    return AnyMessage(type_url=TYPE_URL, value=info.to_bytes())


def is_hint(detail: object) -> bool:
    return getattr(detail, "type_url", "") == TYPE_URL


def retry_after_s(error: RemoraError) -> float | None:
    """Return what `with_retry` said, also when the error came over the wire."""
    for detail in error.details:
        if is_hint(detail):
            delay = RetryInfo.decode(bytes(detail.value)).retry_delay
            return None if delay is None else delay.seconds + delay.nanos / 1e9
    return None


def again_s(error: RemoraError) -> float | None:
    """Return when HTTP's clients should send a refused request again: as the error says, else soon; None for never."""
    after_s = retry_after_s(error)
    if after_s is None and error.http_status in _FOR_NOW:
        return _SOON_S
    return after_s
