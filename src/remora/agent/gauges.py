"""What the metrics say of the moment: read from whoever knows it, at every scrape."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from remora import __version__
from remora.agent.core import Core
from remora.agent.exposition import Sample
from remora.agent.pod_counts import POD_FAMILIES
from remora.workers.contract import SHARED, WorkerInfo

T = TypeVar("T")
#: How the metrics name the domain of workers that belong to nobody yet.
SPARE = "spare"
#: Longer than a scrape takes, shorter than the time between two.
_SCRAPE_S = 0.2


def register(core: Core, *, attachments: Callable[[], int], draining: Callable[[], bool]) -> None:
    """Have all gauges of the agent read at every scrape."""
    exposition, started_s = core.exposition, time.time()
    exposition.by_tenant("remora_sessions", lambda: core.sessions.per_tenant)
    exposition.by_tenant("remora_connections", lambda: core.peers.per_tenant)
    exposition.by_tenant("remora_queued_requests", lambda: core.scheduler.waiting)
    exposition.by_tenant("remora_running_requests", lambda: core.scheduler.running)
    exposition.by_tenant("remora_shared_bytes", lambda: core.sharing.bytes_per_tenant)
    exposition.by_tenant("remora_in_flight_bytes", lambda: core.peers.in_flight_bytes)
    exposition.by_tenant("remora_resources", lambda: Counter(entry[0] for entry in core.store.entries()))
    exposition.by_tenant("remora_resource_bytes", lambda: _resource_bytes(core))
    for name, value in (
        ("remora_store_bytes", lambda: max(0, core.store.bytes_stored)),
        ("remora_attachments", attachments),
        ("remora_log_lines_dropped_total", lambda: core.log.dropped),
        ("remora_log_lines_suppressed_total", lambda: core.log.suppressed),
        ("remora_draining", lambda: int(draining())),
        ("remora_start_time_seconds", lambda: started_s),
    ):
        exposition.read(name, _single(value))
    exposition.read("remora_pod_granted_devices", lambda: _granted(core))
    pods = _OneLook(lambda: core.metrics.pods.sums(core.execution.in_flight()))
    for place, name in enumerate(POD_FAMILIES):
        exposition.read(name, _of_pods(pods, place))
    exposition.read("remora_build_info", lambda: [((__version__,), 1.0)])
    exposition.read("remora_traces_exported_total", lambda: [((), float(core.trace_counts()[0]))])
    exposition.read("remora_traces_dropped_total", lambda: _traces_dropped(core))
    workers = _OneLook(core.workers.workers)
    exposition.read("remora_workers", lambda: _of_workers(core, workers(), lambda _worker: 1))
    exposition.read("remora_worker_busy", lambda: _of_workers(core, workers(), lambda worker: worker.busy))
    exposition.read("remora_worker_memory_bytes", lambda: _of_workers(core, workers(), lambda each: each.memory_bytes))
    exposition.read("remora_worker_restarts_total", lambda: _restarts(core, workers()))
    exposition.read("remora_model_memory_bytes", lambda: _model_memory(core))
    exposition.read("remora_models_loaded", lambda: _models(core))


def _single(value: Callable[[], float]) -> Callable[[], Iterable[Sample]]:
    return lambda: [((), float(value()))]


def _resource_bytes(core: Core) -> Counter[str]:
    sums: Counter[str] = Counter()
    for tenant, _digest, size_bytes, _used_at, _holds in core.store.entries():
        sums[tenant] += size_bytes
    return sums


def _domain(core: Core, domain: str) -> str:
    return domain if domain == SHARED else core.metrics.label(domain) if domain else SPARE


def _traces_dropped(core: Core) -> Iterable[Sample]:
    _exported, lost, dropped = core.trace_counts()
    return [(("buffer",), float(dropped)), (("collector",), float(lost))]


class _OneLook(Generic[T]):
    """Asks once for all metrics of a scrape, which then agree; and every worker costs a file of /proc."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._asked_s = 0.0
        self._known: T | None = None

    def __call__(self) -> T:
        now_s = time.monotonic()
        if self._known is None or now_s - self._asked_s > _SCRAPE_S:
            self._known, self._asked_s = self._ask(), now_s
        return self._known


def _granted(core: Core) -> Iterable[Sample]:
    return [
        ((*names, kind), granted.device_s_per_s)
        for names, holder in core.metrics.pods.holders().items()
        for kind, granted in core.grants.of(holder).items()
    ]


def _of_pods(
    pods: Callable[[], Mapping[tuple[str, str], Sequence[float]]], place: int
) -> Callable[[], Iterable[Sample]]:
    return lambda: [(names, float(sums[place])) for names, sums in pods().items()]


def _of_workers(core: Core, workers: Sequence[WorkerInfo], value: Callable[[WorkerInfo], int]) -> Iterable[Sample]:
    sums: Counter[tuple[str, ...]] = Counter()
    for worker in workers:
        sums[_domain(core, worker.domain), worker.device] += value(worker)
    return [(labels, float(total)) for labels, total in sums.items()]


def _restarts(core: Core, workers: Sequence[WorkerInfo]) -> Iterable[Sample]:
    sums: Counter[tuple[str, ...]] = Counter()
    for worker in workers:
        if worker.domain:
            sums[(_domain(core, worker.domain),)] += worker.restarts
    return [(labels, float(total)) for labels, total in sums.items()]


def _model_memory(core: Core) -> Iterable[Sample]:
    sums: Counter[tuple[str, ...]] = Counter()
    for (domain, model), spec in core.models.loaded_specs().items():
        shown = model if domain == SHARED else "uploaded"
        sums[_domain(core, domain), shown, spec.device] += spec.memory_bytes
    return [(labels, float(total)) for labels, total in sums.items()]


def _models(core: Core) -> Iterable[Sample]:
    counts = Counter(spec.device for spec in core.models.loaded_specs().values())
    return [((device,), float(count)) for device, count in counts.items()]
