"""Traces: which requests are followed, and what is kept of each until it is exported.

A request that is not sampled costs one look at a header. A sampled one leaves one record when it ends; spans, ids and
bytes are made of it later, in the exporter's thread (`otlp`). Records wait in a buffer of bounded size, of which one
tenant gets half at most; what does not fit is dropped and counted, and no request ever waits.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

from remora.agent.timings import Timings
from remora.agent.trace_context import TraceContext, parse

#: Requests that wait to be exported.
MAX_RECORDS = 4096
#: Enough for a message to the collector at once.
BATCH = 256


class Carrier(Protocol):
    """A request that may carry a trace context."""

    def header(self, name: str) -> str:
        """Return a header or a value of the metadata, empty if it is not there."""


@dataclass(slots=True)
class Record:
    """One request that has ended. Times are on the monotonic clock."""

    context: TraceContext | None
    door: str
    method: str
    operation: str
    model: str
    tenant: str
    session: str
    received_bytes: int
    began_s: float
    ended_s: float
    #: To add to the monotonic clock's nanoseconds for those since the epoch.
    offset_ns: int
    #: None if the request never came as far as a queue.
    timings: Timings | None
    #: Empty: it went well.
    code: str
    error: str


class Trace:
    """A sampled request under way."""

    __slots__ = ("_tracer", "began_s", "context")

    def __init__(self, tracer: Tracer, context: TraceContext | None) -> None:
        self._tracer = tracer
        self.context = context
        self.began_s = time.monotonic()

    def end(
        self,
        *,
        door: str,
        method: str,
        operation: str,
        model: str,
        tenant: str,
        session: str,
        received_bytes: int,
        timings: Timings | None,
        code: str = "",
        error: str = "",
    ) -> None:
        """Record the request; `code` and `error` of one that failed."""
        now_s = time.monotonic()
        offset_ns = time.time_ns() - time.monotonic_ns()
        self._tracer.buffer.put(
            Record(
                self.context,
                door,
                method,
                operation,
                model,
                tenant,
                session,
                received_bytes,
                self.began_s,
                now_s,
                offset_ns,
                timings,
                code,
                error[:500],
            )
        )


class Buffer:
    """Records between the loop's thread and the exporter's."""

    def __init__(self, most: int = MAX_RECORDS) -> None:
        self._most = most
        self._records: deque[Record] = deque()
        self._of_tenant: Counter[str] = Counter()
        self._news = threading.Condition()
        self._closed = False
        self.dropped = 0

    def put(self, record: Record) -> None:
        with self._news:
            tenant = record.tenant
            if len(self._records) >= self._most or self._of_tenant[tenant] >= self._most // 2 or self._closed:
                self.dropped += 1
                return
            self._records.append(record)
            self._of_tenant[tenant] += 1
            if len(self._records) == BATCH:
                self._news.notify()

    def take(self, timeout_s: float) -> list[Record]:
        """Wait until there are `BATCH` records, for so long at most; return what is there."""
        with self._news:
            if len(self._records) < BATCH and not self._closed:
                self._news.wait(timeout_s)
            taken = [self._records.popleft() for _ in range(min(BATCH, len(self._records)))]
            for record in taken:
                self._of_tenant[record.tenant] -= 1
                if not self._of_tenant[record.tenant]:
                    del self._of_tenant[record.tenant]
            return taken

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Take nothing more, and wake whoever waits in `take`."""
        with self._news:
            self._closed = True
            self._news.notify_all()


class Tracer:
    """Decides which requests are followed: those whose caller does, and a share of those whose caller says nothing.

    Args:
        ratio: Of requests without a trace context, 0..1.
    """

    def __init__(self, buffer: Buffer, ratio: float) -> None:
        self.buffer = buffer
        self._ratio = ratio
        self._random = random.random

    def begin(self, carrier: Carrier) -> Trace | None:
        """Return what ends the request's trace; None if it has none."""
        traceparent = carrier.header("traceparent")
        context = parse(traceparent, carrier.header("tracestate")) if traceparent else None
        if context is not None:
            return Trace(self, context) if context.sampled else None
        return Trace(self, None) if self._ratio and self._random() < self._ratio else None
