"""The agent's metrics as Prometheus reads them. `FAMILIES` is the whole list; docs/observing.md is checked against it.

prometheus_client formats and is imported when somebody asks: 40 ms that a path of requests should not pay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remora.agent.metrics import BUCKETS_S, Histogram, Metrics
from remora.agent.timings import STAGES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[tuple[str, ...], float]
Read = Callable[[], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `counter`, `gauge`, `histogram` or `summary`."""

    kind: str
    labels: tuple[str, ...]
    text: str


FAMILIES: Mapping[str, Family] = {
    "remora_requests_total": Family(
        "counter", ("door", "method", "tenant", "code"), "Requests answered, well or with an error."
    ),
    "remora_refusals_total": Family(
        "counter", ("tenant", "rule"), "Requests refused or failed, by the limit or rule, else by the error's code."
    ),
    "remora_received_bytes_total": Family("counter", ("tenant",), "Bytes of input of operations."),
    "remora_sent_bytes_total": Family("counter", ("tenant",), "Bytes of output of operations."),
    "remora_operation_seconds": Family("histogram", ("tenant",), "Time from an operation's arrival to its result."),
    "remora_stage_seconds": Family(
        "histogram", ("operation", "model", "stage"), "Time that operations spent in a stage, of all tenants."
    ),
    "remora_tenant_stage_seconds": Family(
        "summary", ("tenant", "operation", "model", "stage"), "Time that a tenant's operations spent in a stage."
    ),
    "remora_device_busy_seconds_total": Family(
        "counter", ("tenant", "device"), "Time that operations ran on a device; exceeds the clock where several run."
    ),
    "remora_model_memory_bytes": Family("gauge", ("domain", "model", "device"), "Memory that a loaded model takes."),
    "remora_models_loaded": Family("gauge", ("device",), "Models in the memory of workers."),
    "remora_sessions": Family("gauge", ("tenant",), "Sessions."),
    "remora_connections": Family("gauge", ("tenant",), "Connections of callers."),
    "remora_queued_requests": Family("gauge", ("tenant",), "Operations that wait for their turn."),
    "remora_running_requests": Family("gauge", ("tenant",), "Operations that are with a worker."),
    "remora_shared_bytes": Family("gauge", ("tenant",), "Bytes of memory shared with local clients."),
    "remora_in_flight_bytes": Family("gauge", ("tenant",), "Bytes of large messages in shared memory."),
    "remora_resources": Family("gauge", ("tenant",), "Resources stored."),
    "remora_resource_bytes": Family("gauge", ("tenant",), "Bytes of the resources that a tenant may use."),
    "remora_store_bytes": Family("gauge", (), "Bytes on the disk, unfinished uploads included; each counted once."),
    "remora_attachments": Family("gauge", (), "Attached sandboxes."),
    "remora_workers": Family("gauge", ("domain", "device"), 'Worker processes; domain "spare" has no owner yet.'),
    "remora_worker_busy": Family("gauge", ("domain", "device"), "Jobs that workers have in hand."),
    "remora_worker_restarts_total": Family("counter", ("domain",), "Times a worker was started again after it died."),
    "remora_worker_memory_bytes": Family("gauge", ("domain", "device"), "Resident memory of workers."),
    "remora_log_lines_dropped_total": Family("counter", (), "Log lines lost because nobody read them."),
    "remora_log_lines_suppressed_total": Family("counter", (), "Log lines beyond a tenant's budget."),
    "remora_traces_exported_total": Family("counter", (), "Sampled requests whose spans a collector has taken."),
    "remora_traces_dropped_total": Family(
        "counter", ("reason",), "Sampled requests that were not exported: the buffer was full, or the collector failed."
    ),
    "remora_draining": Family("gauge", (), "1 while the agent refuses what is new and finishes what runs."),
    "remora_start_time_seconds": Family("gauge", (), "When the agent started, since the epoch."),
    "remora_build_info": Family("gauge", ("version",), "1; the version is in the label."),
}


class Exposition:
    """Reads the counters, and whatever else registers itself, at every scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._reads: dict[str, Read] = {}

    def read(self, name: str, read: Read) -> None:
        """Have `read` called for the samples of a family of `FAMILIES` at every scrape."""
        if name not in FAMILIES:
            raise KeyError(name)
        self._reads[name] = read

    def by_tenant(self, name: str, table: Callable[[], Mapping[str, float]]) -> None:
        """Register numbers by tenant; those without series of their own are added up."""

        def read() -> Iterable[Sample]:
            sums: Counter[str] = Counter()
            for tenant, value in table().items():
                sums[self._metrics.label(tenant)] += int(value)
            return [((tenant,), float(value)) for tenant, value in sums.items()]

        self.read(name, read)

    @staticmethod
    def prepare() -> None:
        """Import what `text` needs; in a thread, because it takes a tenth of a second."""
        import prometheus_client.core
        import prometheus_client.exposition  # noqa: F401 - imported for the next import

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return bytes(generate_latest(registry))

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families (prometheus_client's collector interface)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield from self._counted()
        for name, read in self._reads.items():
            family = FAMILIES[name]
            made = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(
                name, family.text, labels=family.labels
            )
            for values, value in read():
                made.add_metric(values, value)
            yield made

    def _counted(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, SummaryMetricFamily

        tenants = self._metrics.all_tenants()
        for name, samples in (
            ("remora_requests_total", lambda t, c: (((d, m, t, code), n) for (d, m, code), n in c.requests.items())),
            ("remora_refusals_total", lambda t, c: (((t, rule), n) for rule, n in c.refusals.items())),
            ("remora_received_bytes_total", lambda t, c: [((t,), c.received_bytes)]),
            ("remora_sent_bytes_total", lambda t, c: [((t,), c.sent_bytes)]),
            ("remora_device_busy_seconds_total", lambda t, c: (((t, d), us / 1e6) for d, us in c.device_us.items())),
        ):
            counter = CounterMetricFamily(name, FAMILIES[name].text, labels=FAMILIES[name].labels)
            for tenant, counts in tenants.items():
                for values, value in samples(tenant, counts):
                    counter.add_metric(values, value)
            yield counter
        name = "remora_operation_seconds"
        durations = HistogramMetricFamily(name, FAMILIES[name].text, labels=FAMILIES[name].labels)
        for tenant, counts in tenants.items():
            if counts.uses:
                durations.add_metric((tenant,), cumulative(counts.duration), counts.duration.sum_us / 1e6)
        yield durations
        name = "remora_stage_seconds"
        stages = HistogramMetricFamily(name, FAMILIES[name].text, labels=FAMILIES[name].labels)
        for (operation, model), histograms in self._metrics.stages.items():
            for stage, histogram in zip(STAGES, histograms, strict=True):
                stages.add_metric((operation, model, stage), cumulative(histogram), histogram.sum_us / 1e6)
        yield stages
        name = "remora_tenant_stage_seconds"
        spent = SummaryMetricFamily(name, FAMILIES[name].text, labels=FAMILIES[name].labels)
        for tenant, counts in tenants.items():
            for (operation, model), use in counts.uses.items():
                for stage, value_us in zip(STAGES, use.stage_us, strict=True):
                    spent.add_metric((tenant, operation, model, stage), use.count, value_us / 1e6)
        yield spent


def cumulative(histogram: Histogram) -> Sequence[tuple[str, float]]:
    """Return a histogram's buckets as Prometheus counts them: each holds those before it."""
    total, buckets = 0, []
    for bound, count in zip((*(str(bound) for bound in BUCKETS_S), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
