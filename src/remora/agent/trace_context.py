"""W3C trace context: which trace a request belongs to, as its caller says in `traceparent` and `tracestate`.

Source: https://www.w3.org/TR/trace-context/. What cannot be read is no error: the request is as good without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: A future version may append fields; version ff is forbidden.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE = 512
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A caller's span: 16 bytes of trace id, 8 of span id."""

    trace_id: bytes
    span_id: bytes
    sampled: bool
    state: str = ""


def parse(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """Return the caller's context, None if there is none that can be read."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if found is None or (found[1] == "00" and found[5]):
        return None
    trace_id, span_id = bytes.fromhex(found[2]), bytes.fromhex(found[3])
    if not any(trace_id) or not any(span_id):
        return None
    state = tracestate if len(tracestate) <= _MAX_STATE and tracestate.isprintable() else ""
    return TraceContext(trace_id, span_id, bool(int(found[4], 16) & _SAMPLED), state)
