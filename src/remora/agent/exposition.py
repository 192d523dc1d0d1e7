"""The agent's metrics as Prometheus reads them. `FAMILIES` is the whole list; docs/observing.md is checked against it.

The text is made here: the loop stops for it, and prometheus_client takes 40 to 70 ms for 7,000 lines where this takes
8. The tests read it with theirs. Format: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from remora.agent.metrics import BUCKETS_S, Histogram, Metrics
from remora.agent.timings import STAGES

_BOUNDS = (*map(str, BUCKETS_S), "+Inf")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[tuple[str, ...], float]
#: A number; a histogram; the count and sum of a summary.
Value = float | Histogram | tuple[int, float]
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
    "remora_pod_in_flight_requests": Family("gauge", ("namespace", "pod"), "Operations of a pod that wait or run."),
    "remora_pod_granted_devices": Family(
        "gauge", ("namespace", "pod", "kind"), "Devices' worth of shares that the kubelet gave to a pod."
    ),
    "remora_pod_operations_total": Family("counter", ("namespace", "pod"), "Operations that workers answered a pod."),
    "remora_pod_queue_seconds_total": Family(
        "counter", ("namespace", "pod"), "Time that a pod's operations waited for their turn."
    ),
    "remora_pod_device_seconds_total": Family(
        "counter", ("namespace", "pod"), "Time that a pod's operations ran on a device."
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

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        read = dict(self._reads)
        counted = self._counted()
        out: list[str] = []
        for name, family in FAMILIES.items():
            samples = counted.get(name)
            if samples is None:
                samples = read[name]() if name in read else ()
            out.append(f"# HELP {name} {family.text}\n# TYPE {name} {family.kind}\n")
            for values, value in samples:
                labels = ",".join(
                    [f'{label}="{_escaped(text)}"' for label, text in zip(family.labels, values, strict=True)]
                )
                if isinstance(value, Histogram):
                    _add_histogram(out, name, labels, value)
                elif isinstance(value, tuple):
                    out.append(f"{name}_count{{{labels}}} {value[0]}\n{name}_sum{{{labels}}} {value[1]}\n")
                elif labels:
                    out.append(f"{name}{{{labels}}} {value}\n")
                else:
                    out.append(f"{name} {value}\n")
        return "".join(out).encode()

    def _counted(self) -> Mapping[str, Iterable[tuple[tuple[str, ...], Value]]]:
        """Return the samples of what `Metrics` counts."""
        tenants = self._metrics.all_tenants().items()
        return {
            "remora_requests_total": (
                ((door, method, tenant, code), count)
                for tenant, counts in tenants
                for (door, method, code), count in counts.requests.items()
            ),
            "remora_refusals_total": (
                ((tenant, rule), count) for tenant, counts in tenants for rule, count in counts.refusals.items()
            ),
            "remora_received_bytes_total": (((tenant,), counts.received_bytes) for tenant, counts in tenants),
            "remora_sent_bytes_total": (((tenant,), counts.sent_bytes) for tenant, counts in tenants),
            "remora_device_busy_seconds_total": (
                ((tenant, device), busy_us / 1e6)
                for tenant, counts in tenants
                for device, busy_us in counts.device_us.items()
            ),
            "remora_operation_seconds": (((tenant,), counts.duration) for tenant, counts in tenants if counts.uses),
            "remora_stage_seconds": (
                ((operation, model, stage), histogram)
                for (operation, model), histograms in self._metrics.stages.items()
                for stage, histogram in zip(STAGES, histograms, strict=True)
            ),
            "remora_tenant_stage_seconds": (
                ((tenant, operation, model, stage), (use.count, spent_us / 1e6))
                for tenant, counts in tenants
                for (operation, model), use in counts.uses.items()
                for stage, spent_us in zip(STAGES, use.stage_us, strict=True)
            ),
        }


def _escaped(text: str) -> str:
    if "\\" in text or '"' in text or "\n" in text:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return text


def _add_histogram(out: list[str], name: str, labels: str, histogram: Histogram) -> None:
    total = 0
    for bound, count in zip(_BOUNDS, histogram.counts, strict=True):
        total += count
        out.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}\n')
    out.append(f"{name}_count{{{labels}}} {total}\n{name}_sum{{{labels}}} {histogram.sum_us / 1e6}\n")
