"""The trace that a call belongs to: what a caller passes, else OpenTelemetry's current span, as ttrpc metadata.

OpenTelemetry is looked for among the modules that are loaded and never imported: who does not use it pays one look-up.
Format: https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import sys

from remora.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Optional


def metadata(traceparent: Optional[str]) -> Optional[Dict[str, str]]:
    """Return the metadata of a call.

    Args:
        traceparent: W3C trace context, `00-<trace id>-<span id>-<flags>`; None for OpenTelemetry's current span, if
            there is one; empty for none.

    Raises:
        InvalidArgumentError: it is no text.
    """
    if traceparent is None:
        api = sys.modules.get("opentelemetry.trace")
        return None if api is None else _of_current_span(api)
    if not isinstance(traceparent, str):
        raise InvalidArgumentError(
            f"traceparent={traceparent!r} is no text", fix="pass 00-<32 digits>-<16 digits>-<2 digits>"
        )
    return {"traceparent": traceparent} if traceparent else None


def _of_current_span(api: object) -> Optional[Dict[str, str]]:
    context = api.get_current_span().get_span_context()  # type: ignore[attr-defined]  # a module found at run time
    if not context.is_valid:
        return None
    found = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"}
    state = context.trace_state.to_header() if context.trace_state else ""
    if state:
        found["tracestate"] = state
    return found
