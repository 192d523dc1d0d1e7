"""What happened between two looks at an agent, as values: rates, latencies and shares. No terminal, no socket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remora.wire import control_v1 as v1

_SHOWN_TENANTS = 100


@dataclass(frozen=True)
class TenantLoad:
    """Rates are per second; `p50_ms` and `p99_ms` are None where nothing ended in between."""

    tenant: str
    requests_per_s: float
    refusals_per_s: float
    received_bytes_per_s: float
    sent_bytes_per_s: float
    device_share: float
    p50_ms: float | None
    p99_ms: float | None
    queued: int
    running: int
    sessions: int
    connections: int


@dataclass(frozen=True)
class ModelLoad:
    """Mean milliseconds per request in each stage; None where nothing ended in between."""

    model: str
    operation: str
    requests_per_s: float
    queue_ms: float | None
    batch_ms: float | None
    run_ms: float | None
    copy_ms: float | None


@dataclass(frozen=True)
class DeviceLoad:
    """`busy` is the operations that ran at once, on average."""

    device: str
    busy: float
    memory_bytes: int
    models: int


@dataclass(frozen=True)
class WorkerLoad:
    id: str
    pid: int
    domain: str
    device: str
    models: tuple[str, ...]
    jobs: int
    restarts: int
    memory_bytes: int


@dataclass(frozen=True)
class Load:
    version: str
    pid: int
    uptime_s: float
    draining: bool
    interval_s: float
    sessions: int
    connections: int
    store_bytes: int
    tenants: tuple[TenantLoad, ...]
    models: tuple[ModelLoad, ...]
    devices: tuple[DeviceLoad, ...]
    workers: tuple[WorkerLoad, ...]


def quantile_ms(counts: Sequence[int], bounds_s: Sequence[float], share: float) -> float | None:
    """Return the time that `share` of the counted took at most, interpolated in its bucket; None without counts."""
    total = sum(counts)
    if not total:
        return None
    rank, seen, lower_s = share * total, 0, 0.0
    for count, upper_s in zip(counts, bounds_s, strict=False):
        if seen + count >= rank and count:
            return (lower_s + (upper_s - lower_s) * (rank - seen) / count) * 1000
        seen, lower_s = seen + count, upper_s
    return lower_s * 1000  # beyond the last bound: that much at least


def load_between(before: v1.UsageResponse, after: v1.UsageResponse) -> Load:
    """Return what happened from one answer to the next; of another agent's since it started."""
    status, old = after.status or v1.StatusResponse(), before.status or v1.StatusResponse()
    interval_s = after.time_s - before.time_s
    if old.pid != status.pid or interval_s <= 0:
        before, interval_s = v1.UsageResponse(), max(status.uptime_s, 1e-3)
    return Load(
        version=status.version,
        pid=status.pid,
        uptime_s=status.uptime_s,
        draining=after.draining,
        interval_s=interval_s,
        sessions=status.sessions,
        connections=status.connections,
        store_bytes=status.store_bytes,
        tenants=_tenants(before, after, interval_s),
        models=_models(before, after, interval_s),
        devices=_devices(before, after, interval_s),
        workers=tuple(
            WorkerLoad(
                worker.id,
                worker.pid,
                worker.domain or "spare",
                worker.device,
                tuple(worker.models),
                worker.jobs,
                worker.restarts,
                worker.memory_bytes,
            )
            for worker in status.workers
        ),
    )


def _tenants(before: v1.UsageResponse, after: v1.UsageResponse, interval_s: float) -> tuple[TenantLoad, ...]:
    old = {entry.tenant: entry for entry in before.tenants}
    device_us = {e.tenant: _since(e.device_us, getattr(old.get(e.tenant), "device_us", 0)) for e in after.tenants}
    all_us = sum(device_us.values()) or 1
    loads = []
    for entry in after.tenants:
        was = old.get(entry.tenant, v1.TenantUsage())
        durations = [_since(new, known) for new, known in _pairs(entry.durations, was.durations)]
        loads.append(
            TenantLoad(
                entry.tenant,
                _since(entry.requests, was.requests) / interval_s,
                _since(entry.refusals, was.refusals) / interval_s,
                _since(entry.received_bytes, was.received_bytes) / interval_s,
                _since(entry.sent_bytes, was.sent_bytes) / interval_s,
                device_us[entry.tenant] / all_us,
                quantile_ms(durations, after.bounds_s, 0.5),
                quantile_ms(durations, after.bounds_s, 0.99),
                entry.queued,
                entry.running,
                entry.sessions,
                entry.connections,
            )
        )
    loads.sort(key=lambda load: (-load.device_share, -load.requests_per_s, -load.sessions, load.tenant))
    return tuple(loads[:_SHOWN_TENANTS])


def _models(before: v1.UsageResponse, after: v1.UsageResponse, interval_s: float) -> tuple[ModelLoad, ...]:
    old = {(entry.operation, entry.model): entry for entry in before.models}
    loads = []
    for entry in after.models:
        was = old.get((entry.operation, entry.model), v1.ModelUsage())
        count = _since(entry.requests, was.requests)
        spent_ms = [
            _since(new, known) / count / 1000 if count else None
            for new, known in (
                (entry.queue_us, was.queue_us),
                (entry.batch_us, was.batch_us),
                (entry.run_us, was.run_us),
                (entry.copy_us, was.copy_us),
            )
        ]
        loads.append(ModelLoad(entry.model, entry.operation, count / interval_s, *spent_ms))
    return tuple(sorted(loads, key=lambda load: (-load.requests_per_s, load.model)))


def _devices(before: v1.UsageResponse, after: v1.UsageResponse, interval_s: float) -> tuple[DeviceLoad, ...]:
    old = {entry.device: entry.busy_us for entry in before.devices}
    return tuple(
        DeviceLoad(
            entry.device,
            _since(entry.busy_us, old.get(entry.device, 0)) / 1e6 / interval_s,
            entry.memory_bytes,
            entry.models,
        )
        for entry in after.devices
    )


def _pairs(new: Sequence[int], old: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(new, [*old, *([0] * (len(new) - len(old)))], strict=False)


def _since(new: int, old: int) -> int:
    """Return the growth of a counter; one that was forgotten meanwhile starts again at zero."""
    return new - old if new >= old else new
