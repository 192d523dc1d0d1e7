"""Exporting traces to a collector: OTLP over HTTP with protobuf, from one thread of its own.

Source: https://opentelemetry.io/docs/specs/otlp/#otlphttp. Why not OpenTelemetry's SDK: docs/decisions/0013.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from remora import __version__
from remora.agent import otlp_messages as otlp
from remora.agent.trace_options import TraceOptions
from remora.agent.tracing import Buffer, Record

#: Records go at least this often.
_INTERVAL_S = 1.0
_TIMEOUT_S = 10.0
#: How long the agent's end may wait for the last ones.
_LAST_S = 2.0
_ATTEMPTS = 5
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0)
#: What a collector may take later.
_RETRYABLE = (429, 502, 503, 504)


def _ns(record: Record, at_s: float) -> int:
    return int(at_s * 1e9) + record.offset_ns


def spans(record: Record, new_id: Callable[[int], bytes]) -> Iterator[otlp.Span]:
    """Yield the spans of a request: the door's, and below it one for each stage that it passed.

    What is drawn as `copy` before `run` happens in part after it: the worker tells how long it ran, not when. The `run`
    of a batch is that of the whole, and says what its own part was.
    """
    context, timings = record.context, record.timings
    trace_id = context.trace_id if context is not None else new_id(16)
    door_id = new_id(8)
    yield otlp.Span(
        trace_id=trace_id,
        span_id=door_id,
        parent_span_id=context.span_id if context is not None else b"",
        trace_state=context.state if context is not None else "",
        name=f"{record.door}/{record.method}",
        kind=otlp.KIND_SERVER,
        start_time_unix_nano=_ns(record, record.began_s),
        end_time_unix_nano=_ns(record, record.ended_s),
        attributes=otlp.attributes(
            {
                "rpc.method": record.method,
                "remora.door": record.door,
                "remora.operation": record.operation,
                "remora.model": record.model,
                "remora.tenant": record.tenant,
                "remora.session": record.session,
                "remora.received_bytes": record.received_bytes,
                "remora.code": record.code,
            }
        ),
        status=otlp.Status(code=otlp.STATUS_ERROR, message=record.error) if record.code else None,
        flags=1,
    )
    if timings is None:
        return
    batched_s = timings.begun_s - timings.batch_us / 1e6
    running_s = timings.ended_s - (timings.run_us + timings.others_us) / 1e6
    for name, start_s, end_s in (
        ("queue", timings.arrived_s, batched_s if timings.begun_s else record.ended_s),
        ("batch", batched_s, timings.begun_s if timings.batch_us else 0.0),
        ("copy", timings.begun_s, running_s if timings.ended_s else 0.0),
        ("run", running_s, timings.ended_s if timings.run_us else 0.0),
    ):
        if end_s:
            yield otlp.Span(
                trace_id=trace_id,
                span_id=new_id(8),
                parent_span_id=door_id,
                name=name,
                kind=otlp.KIND_INTERNAL,
                start_time_unix_nano=_ns(record, start_s),
                end_time_unix_nano=max(_ns(record, start_s), _ns(record, end_s)),
                attributes=otlp.attributes({"remora.own_us": timings.run_us} if name == "run" else {}),
                flags=1,
            )


def request(records: Sequence[Record], service: str, new_id: Callable[[int], bytes]) -> bytes:
    """Return the encoded message that exports `records`."""
    made = [span for record in records for span in spans(record, new_id)]
    resource = otlp.Resource(attributes=otlp.attributes({"service.name": service, "service.version": __version__}))
    scope = otlp.ScopeSpans(scope=otlp.Scope(name="remora.agent", version=__version__), spans=made)
    return otlp.ExportRequest(resource_spans=[otlp.ResourceSpans(resource=resource, scope_spans=[scope])]).to_bytes()


class Exporter:
    """Sends what the buffer holds, until it is closed. `on_trouble` is called in its thread, once for each outage."""

    def __init__(self, buffer: Buffer, target: TraceOptions, on_trouble: Callable[[str], None]) -> None:
        self._buffer = buffer
        self._target = target
        self._on_trouble = on_trouble
        self._random = random.Random()
        self._closing = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self._troubled = False
        #: Requests whose spans a collector has taken, and that it has not.
        self.exported = 0
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        self._buffer.close()
        self._closing.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        while True:
            records = self._buffer.take(_INTERVAL_S)
            if records:
                self._export(records)
            elif self._buffer.closed:
                break
        if self._connection is not None:
            self._connection.close()

    def _new_id(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def _export(self, records: Sequence[Record]) -> None:
        body = request(records, self._target.service, self._new_id)
        for attempt in range(_ATTEMPTS):
            trouble, wait_s = self._post(body)
            if not trouble:
                self.exported += len(records)
                self._troubled = False
                return
            if not self._troubled:
                self._troubled = True
                self._on_trouble(trouble)
            if wait_s < 0 or attempt == _ATTEMPTS - 1 or self._closing.is_set():
                break
            self._closing.wait(max(wait_s, _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]))
        self.lost += len(records)

    def _post(self, body: bytes) -> tuple[str, float]:
        """Return what went wrong (empty: nothing), and how long to wait at least; below zero: it is of no use."""
        parts = urlsplit(self._target.endpoint)
        try:
            if self._connection is None:
                kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
                timeout_s = _LAST_S / 2 if self._closing.is_set() else _TIMEOUT_S
                self._connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            headers = {"Content-Type": "application/x-protobuf", **self._target.headers}
            self._connection.request("POST", path, body, headers)
            answer = self._connection.getresponse()
            answer.read(65536)
        except (OSError, http.client.HTTPException) as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return f"{type(error).__name__}: {error}", 0.0
        if answer.will_close or not answer.isclosed():
            self._connection.close()
            self._connection = None
        if 200 <= answer.status < 300:
            return "", 0.0
        after = answer.getheader("Retry-After") or ""
        wait_s = min(30.0, float(after)) if after.isdigit() else 0.0
        return f"the collector answers {answer.status} {answer.reason}", wait_s if answer.status in _RETRYABLE else -1.0
