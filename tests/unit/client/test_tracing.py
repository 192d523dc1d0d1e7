"""Which trace a call of the SDK belongs to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from fake_agent import FakeAgent
from remora.client import session as sessions
from remora.client import tracing
from remora.errors import InvalidArgumentError

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_context_that_is_given_is_passed_on() -> None:
    assert tracing.metadata(TRACEPARENT) == {"traceparent": TRACEPARENT}
    assert tracing.metadata("") is None
    with pytest.raises(InvalidArgumentError, match="traceparent"):
        tracing.metadata(3)  # type: ignore[arg-type]  # what a caller may do


def test_opentelemetrys_current_span_is_passed_on() -> None:
    assert tracing.metadata(None) is None  # there is none
    state = TraceState([("a", "b")])
    context = SpanContext(
        int(TRACEPARENT[3:35], 16), int(TRACEPARENT[36:52], 16), True, TraceFlags(TraceFlags.SAMPLED), state
    )
    with trace.use_span(NonRecordingSpan(context)):
        assert tracing.metadata(None) == {"traceparent": TRACEPARENT, "tracestate": "a=b"}
        assert tracing.metadata("") is None


def test_opentelemetry_is_not_imported_for_those_who_do_not_use_it() -> None:
    code = (
        "import sys; from remora.client import tracing; print(tracing.metadata(None), 'opentelemetry' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "None False"


def test_calls_take_a_context(tmp_path: Path) -> None:
    with FakeAgent(tmp_path / "a.sock") as agent, sessions.connect(agent.address) as session:
        session.classify(b"picture", traceparent=TRACEPARENT)
        assert bytes(agent.called("Classify")[0].image) == b"picture"
