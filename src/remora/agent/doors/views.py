"""What the control door shows an operator: sessions, resources, models, and how much everyone uses.

Only here are tenants seen side by side; the door lets in the agent's own user and root alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice

from remora.agent.core import Core
from remora.agent.metrics import BUCKETS_S
from remora.wire import control_v1 as v1
from remora.workers.contract import SHARED

#: Entries of one answer: each costs the loop ten microseconds.
MAX_PAGE = 500


def sessions(core: Core, request: v1.PageRequest) -> v1.SessionsResponse:
    chosen = (session for session in core.sessions if request.tenant in ("", session.tenant))
    return v1.SessionsResponse(
        sessions=[
            v1.SessionEntry(
                id=session.id,
                tenant=session.tenant,
                owner=session.owner,
                vaccel=session.number != 0,
                template=session.template,
                connections=session.connections,
                models=sorted(session.models or ()),
                resources=len(session.holds or ()),
                lease_s=core.sessions.lease_s(session),
            )
            for session in islice(chosen, request.offset, request.offset + _limit(request))
        ]
    )


def resources(core: Core, request: v1.PageRequest) -> v1.ResourcesResponse:
    loaded = core.models.loaded_specs()
    chosen = (entry for entry in core.store.entries() if request.tenant in ("", entry[0]))
    return v1.ResourcesResponse(
        resources=[
            v1.ResourceEntry(
                digest=digest,
                tenant=tenant,
                size_bytes=size_bytes,
                holds=holds,
                used_at_s=used_at_s,
                loaded=(tenant, digest) in loaded,
            )
            for tenant, digest, size_bytes, used_at_s, holds in islice(
                chosen, request.offset, request.offset + _limit(request)
            )
        ]
    )


def models(core: Core) -> v1.LoadedModelsResponse:
    users: Counter[tuple[str, str]] = Counter()
    for (tenant, model), count in core.sessions.model_users.items():
        users[tenant if model.startswith("sha256:") else SHARED, model] += count
    return v1.LoadedModelsResponse(
        models=[
            v1.LoadedModel(
                name=model,
                domain=domain,
                task=spec.task,
                device=spec.device,
                memory_bytes=spec.memory_bytes,
                sessions=users[domain, model],
            )
            for (domain, model), spec in core.models.loaded_specs().items()
        ]
    )


def usage(core: Core, status: v1.StatusResponse) -> v1.UsageResponse:
    return v1.UsageResponse(
        time_s=time.monotonic(),
        draining=core.execution.closed is not None,
        bounds_s=list(BUCKETS_S),
        tenants=_tenants(core),
        models=[
            v1.ModelUsage(
                operation=operation,
                model=model,
                requests=sum(histograms[0].counts),
                queue_us=histograms[0].sum_us,
                batch_us=histograms[1].sum_us,
                run_us=histograms[2].sum_us,
                copy_us=histograms[3].sum_us,
            )
            for (operation, model), histograms in core.metrics.stages.items()
        ],
        devices=_devices(core),
        status=status,
    )


def _limit(request: v1.PageRequest) -> int:
    return min(request.limit or MAX_PAGE, MAX_PAGE)


def _tenants(core: Core) -> list[v1.TenantUsage]:
    label = core.metrics.label

    def by_label(table: Mapping[str, int]) -> Counter[str]:
        sums: Counter[str] = Counter()
        for tenant, value in table.items():
            sums[label(tenant)] += value
        return sums

    held, connected = by_label(core.sessions.per_tenant), by_label(core.peers.per_tenant)
    waiting, running = by_label(core.scheduler.waiting), by_label(core.scheduler.running)
    counts = core.metrics.all_tenants()
    found = []
    for tenant in dict.fromkeys([*counts, *held, *connected]):
        entry = v1.TenantUsage(
            tenant=tenant,
            sessions=held[tenant],
            connections=connected[tenant],
            queued=waiting[tenant],
            running=running[tenant],
        )
        counted = counts.get(tenant)
        if counted is not None:
            entry.requests = counted.requests.total()
            entry.refusals = counted.refusals.total()
            entry.received_bytes, entry.sent_bytes = counted.received_bytes, counted.sent_bytes
            entry.device_us = counted.device_us.total()
            entry.durations = list(counted.duration.counts)
        found.append(entry)
    return found


def _devices(core: Core) -> list[v1.DeviceUsage]:
    busy_us: Counter[str] = Counter()
    memory_bytes: Counter[str] = Counter()
    loaded: Counter[str] = Counter()
    for counts in core.metrics.all_tenants().values():
        busy_us.update(counts.device_us)
    for spec in core.models.loaded_specs().values():
        memory_bytes[spec.device] += spec.memory_bytes
        loaded[spec.device] += 1
    return [
        v1.DeviceUsage(device=device, busy_us=busy_us[device], memory_bytes=memory_bytes[device], models=loaded[device])
        for device in sorted(busy_us.keys() | memory_bytes.keys())
    ]
