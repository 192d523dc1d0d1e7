"""What the agent counts, and how Prometheus reads it.

Counting happens on the path of every request, so it is plain integers in plain dictionaries; prometheus_client, which
takes a lock and several calls per count, is imported when somebody asks and only formats.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: Upper bounds of the time histograms, seconds.
BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BUCKETS_US = tuple(bound * 1e6 for bound in BUCKETS_S)
#: Series of one metric. Tenants and models come and go; a scrape must stay small, so the rest is counted as "other".
MAX_SERIES = 2000
OTHER = "other"

Sample = tuple[tuple[str, ...], float]


class _Histogram:
    __slots__ = ("counts", "sum_us")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_us = 0.0

    def add(self, value_us: float) -> None:
        self.counts[bisect_left(_BUCKETS_US, value_us)] += 1
        self.sum_us += value_us


class Metrics:
    """Counters of the agent. Gauges are asked for when they are read: register them with `gauge`."""

    def __init__(self) -> None:
        #: (door, method, tenant, code name) of every request answered.
        self._requests: Counter[tuple[str, str, str, str]] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()  # (tenant, rule or error)
        self._queue: dict[tuple[str, str], _Histogram] = {}
        self._run: dict[tuple[str, str], _Histogram] = {}
        self._received: Counter[str] = Counter()
        self._gauges: list[tuple[str, str, Sequence[str], Callable[[], Sequence[Sample]]]] = []
        self.scrapes = 0

    def answered(self, door: str, method: str, tenant: str, code: str) -> None:
        key = (door, method, tenant, code)
        if key not in self._requests and len(self._requests) >= MAX_SERIES:
            key = (door, OTHER, OTHER, code)
        self._requests[key] += 1

    def refused(self, tenant: str, rule: str) -> None:
        key = (tenant, rule)
        if key not in self._refused and len(self._refused) >= MAX_SERIES:
            key = (OTHER, rule)
        self._refused[key] += 1

    def received(self, tenant: str, size_bytes: int) -> None:
        if tenant not in self._received and len(self._received) >= MAX_SERIES:
            tenant = OTHER
        self._received[tenant] += size_bytes

    def ran(self, operation: str, model: str, queue_us: int, run_us: int) -> None:
        key = (operation, model)
        queue = self._queue.get(key)
        if queue is None:
            if len(self._queue) >= MAX_SERIES:
                key = (operation, OTHER)
            queue = self._queue.setdefault(key, _Histogram())
            self._run.setdefault(key, _Histogram())
        queue.add(queue_us)
        self._run[key].add(run_us)

    def gauge(self, name: str, text: str, labels: Sequence[str], read: Callable[[], Sequence[Sample]]) -> None:
        """Have `read` called for the values of a metric at every scrape."""
        self._gauges.append((name, text, labels, read))

    @staticmethod
    def prepare() -> None:
        """Import what `exposition` needs; in a thread, because it takes a tenth of a second."""
        import prometheus_client.core
        import prometheus_client.exposition  # noqa: F401 - imported for the next import

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import generate_latest

        self.scrapes += 1
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return bytes(generate_latest(registry))

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families (prometheus_client's collector interface)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "remora_requests", "Requests answered.", labels=("door", "method", "tenant", "code")
        )
        for key, count in self._requests.items():
            requests.add_metric(key, count)
        yield requests
        refused = CounterMetricFamily("remora_refusals", "Requests refused, by rule.", labels=("tenant", "rule"))
        for pair, count in self._refused.items():
            refused.add_metric(pair, count)
        yield refused
        received = CounterMetricFamily("remora_received_bytes", "Bytes of requests received.", labels=("tenant",))
        for tenant, count in self._received.items():
            received.add_metric((tenant,), count)
        yield received
        for name, text, table in (
            ("remora_queue_seconds", "Time a request waited for a worker.", self._queue),
            ("remora_run_seconds", "Time a request ran in a worker.", self._run),
        ):
            family = HistogramMetricFamily(name, text, labels=("operation", "model"))
            for pair, histogram in table.items():
                family.add_metric(pair, _cumulative(histogram), histogram.sum_us / 1e6)
            yield family
        for name, text, labels, read in self._gauges:
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for values, value in read():
                gauge.add_metric(values, value)
            yield gauge


def _cumulative(histogram: _Histogram) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip((*(str(bound) for bound in BUCKETS_S), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
