"""Traces: who is followed, what a collector gets, and that neither it nor a loud tenant holds up anyone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_process import wait_until
from otlp_receiver import Receiver, attributes
from remora.agent.otlp import Exporter
from remora.agent.timings import Timings
from remora.agent.trace_context import parse
from remora.agent.trace_options import TraceOptions, options
from remora.agent.tracing import MAX_RECORDS, Buffer, Trace, Tracer
from remora.errors import InvalidArgumentError

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


class Carrier:
    def __init__(self, **headers: str) -> None:
        self._headers = headers

    def header(self, name: str) -> str:
        return self._headers.get(name, "")


def end(trace: Trace | None, tenant: str = "t", **values: Any) -> None:
    assert trace is not None
    fields: dict[str, Any] = {"timings": None, "session": "s", "received_bytes": 5, **values}
    trace.end(door="native", method="Infer", operation="infer", model="m", tenant=tenant, **fields)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_context_that_cannot_be_read_is_none(text: str) -> None:
    assert parse(text) is None


def test_a_context_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = parse(f"42-{TRACE}-{SPAN}-03-more", "a=b")
    assert context is not None
    assert (context.trace_id.hex(), context.span_id.hex(), context.sampled, context.state) == (TRACE, SPAN, True, "a=b")
    assert parse(f"00-{TRACE}-{SPAN}-01", "x" * 1000).state == ""  # type: ignore[union-attr]  # it is read


@given(st.text(max_size=80), st.text(max_size=600))
def test_any_text_is_a_context_or_none(traceparent: str, tracestate: str) -> None:
    parse(traceparent, tracestate)


def test_the_callers_flag_decides_and_the_ratio_only_without_it() -> None:
    never, always = Tracer(Buffer(), 0.0), Tracer(Buffer(), 1.0)
    assert never.begin(Carrier()) is None
    assert always.begin(Carrier()) is not None
    assert never.begin(Carrier(traceparent=f"00-{TRACE}-{SPAN}-01")) is not None
    assert always.begin(Carrier(traceparent=f"00-{TRACE}-{SPAN}-00")) is None
    some = Tracer(Buffer(), 0.25)
    assert 150 < sum(some.begin(Carrier()) is not None for _ in range(1000)) < 350


def test_a_collector_gets_the_spans_of_a_request_below_its_callers(receiver: Receiver) -> None:
    buffer = Buffer()
    exporter = Exporter(buffer, TraceOptions(receiver.endpoint + "/v1/traces", headers={"Key": "secret"}), print)
    trace = Tracer(buffer, 0.0).begin(Carrier(traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="a=b"))
    assert trace is not None
    timings = Timings(trace.began_s)
    timings.begun_s, timings.batch_us = timings.arrived_s + 0.003, 1000
    timings.ended_s, timings.run_us = timings.begun_s + 0.010, 9000
    end(trace, timings=timings)
    end(Tracer(buffer, 1.0).begin(Carrier()), code="NOT_FOUND", error="there is no model")
    exporter.close()
    assert exporter.exported == 2
    assert receiver.headers[0]["key"] == "secret"
    spans = {span.name: span for span in receiver.spans[:5]}
    assert list(spans) == ["native/Infer", "queue", "batch", "copy", "run"]
    door = spans["native/Infer"]
    assert (door.trace_id.hex(), door.parent_span_id.hex(), door.trace_state) == (TRACE, SPAN, "a=b")
    assert door.kind == 2
    assert attributes(door)["remora.tenant"] == "t"
    assert attributes(door)["remora.received_bytes"] == 5
    for name, length_s in (("queue", 0.002), ("batch", 0.001), ("copy", 0.001), ("run", 0.009)):
        span = spans[name]
        assert (span.trace_id, span.parent_span_id) == (door.trace_id, door.span_id)
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(length_s, abs=2e-5)
    assert abs(door.start_time_unix_nano - time.time_ns()) < 60e9
    failed = receiver.spans[5]
    assert (failed.status.code, failed.status.message) == (2, "there is no model")
    assert len(failed.trace_id) == 16
    assert not failed.parent_span_id
    resource = {
        pair.key: pair.value.string_value for pair in receiver.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "remora-agent"


def test_a_collector_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remora.agent.otlp._BACKOFF_S", (0.01,))
    buffer = Buffer()
    troubles: list[str] = []
    exporter = Exporter(buffer, TraceOptions(receiver.endpoint + "/v1/traces"), troubles.append)
    receiver.plan = [503, 429]
    end(Tracer(buffer, 1.0).begin(Carrier()))
    wait_until(lambda: exporter.exported == 1, "the third try succeeds")
    receiver.plan = [400]
    end(Tracer(buffer, 1.0).begin(Carrier()))
    wait_until(lambda: exporter.lost == 1, "it is given up")
    exporter.close()
    assert [trouble[:24] for trouble in troubles] == ["the collector answers 50", "the collector answers 40"]


def test_a_collector_that_hangs_holds_up_no_request_and_the_rest_is_dropped_and_counted(receiver: Receiver) -> None:
    receiver.answering.clear()
    buffer = Buffer()
    exporter = Exporter(buffer, TraceOptions(receiver.endpoint + "/v1/traces"), print)
    tracer = Tracer(buffer, 1.0)
    began_s = time.monotonic()
    for number in range(2 * MAX_RECORDS):
        end(tracer.begin(Carrier()), tenant=f"t{number % 3}")
    assert time.monotonic() - began_s < 2.0
    assert buffer.dropped >= MAX_RECORDS - 256
    began_s = time.monotonic()
    exporter.close()
    assert time.monotonic() - began_s < 3.0


def test_a_tenant_that_samples_everything_leaves_room_for_others() -> None:
    buffer = Buffer(100)
    tracer = Tracer(buffer, 1.0)
    for _ in range(1000):
        end(tracer.begin(Carrier()), tenant="loud")
    end(tracer.begin(Carrier()), tenant="quiet")
    assert buffer.dropped == 950
    taken = buffer.take(0.0)
    assert [record.tenant for record in taken].count("loud") == 50
    assert taken[-1].tenant == "quiet"


def test_no_collector_at_all_is_told_once() -> None:
    troubles: list[str] = []
    buffer = Buffer()
    exporter = Exporter(buffer, TraceOptions("http://127.0.0.1:9/v1/traces"), troubles.append)
    end(Tracer(buffer, 1.0).begin(Carrier()))
    wait_until(lambda: troubles, "it is told")
    exporter.close()
    assert len(troubles) == 1
    assert "refused" in troubles[0]
    assert exporter.lost == 1


@pytest.mark.parametrize(
    ("endpoint", "environment", "url"),
    [
        ("http://h:4318", {}, "http://h:4318/v1/traces"),
        ("http://h:4318/", {}, "http://h:4318/v1/traces"),
        ("https://h/x/traces", {}, "https://h/x/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4318/"}, "http://e:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e/t"}, "http://e/t"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e", "OTEL_SDK_DISABLED": "true"}, None),
        (None, {}, None),
    ],
)
def test_the_endpoint_is_the_options_or_opentelemetrys(
    endpoint: str | None, environment: dict[str, str], url: str | None
) -> None:
    found = options(endpoint, None, environment)
    assert (found.endpoint if found is not None else None) == url


def test_headers_and_ratio_are_read_as_opentelemetry_has_them() -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://e",
        "OTEL_EXPORTER_OTLP_HEADERS": "a=b%20c, d=e",
        "OTEL_TRACES_SAMPLER_ARG": "0.5",
        "OTEL_SERVICE_NAME": "node-1",
    }
    found = options(None, None, environment)
    assert found is not None
    assert (found.headers, found.ratio, found.service) == ({"a": "b c", "d": "e"}, 0.5, "node-1")


@pytest.mark.parametrize(
    ("endpoint", "ratio", "environment", "message"),
    [
        ("ftp://x", None, {}, "OTLP/HTTP"),
        ("h:4318", None, {}, "OTLP/HTTP"),
        ("http://h", 1.5, {}, "0 to 1"),
        ("http://h", None, {"OTEL_TRACES_SAMPLER_ARG": "x"}, "no number"),
        (None, None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "protobuf"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(
    endpoint: str | None, ratio: float | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        options(endpoint, ratio, environment)
