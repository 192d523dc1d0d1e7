"""A container's use of the guest as the metrics that containerd's host version expects."""

from __future__ import annotations

from remora.shim.cgroups import is_unified
from remora.wire import containerd as c
from remora.wire.guest_pod_v1 import StatsResponse
from remora.wire.protobuf import Message
from remora.wire.ttrpc.messages import Any as AnyMessage

#: What cgroup version 1 shows where there is no limit.
_UNLIMITED = (1 << 63) - 4096


def metrics(stats: StatsResponse, *, unified: bool | None = None) -> AnyMessage:
    """Return the stats in the form of the host's cgroup version: what reads them may know only that one."""
    if is_unified() if unified is None else unified:
        return _any(c.METRICS_V2_URL, _version_2(stats))
    return _any(c.METRICS_V1_URL, _version_1(stats))


def _any(url: str, message: Message) -> AnyMessage:
    return AnyMessage(type_url=url, value=b"".join(message.encode()))


def _version_1(stats: StatsResponse) -> c.MetricsV1:
    return c.MetricsV1(
        pids=c.PidsStat(current=stats.pids, limit=stats.pids_limit),
        cpu=c.CpuStatV1(
            usage=c.CpuUsageV1(
                total=stats.cpu_us * 1000, kernel=stats.cpu_system_us * 1000, user=stats.cpu_user_us * 1000
            ),
            throttling=c.ThrottleV1(
                periods=stats.cpu_periods,
                throttled_periods=stats.cpu_throttled,
                throttled_time=stats.cpu_throttled_us * 1000,
            ),
        ),
        memory=c.MemoryStatV1(
            rss=stats.anon_bytes,
            total_rss=stats.anon_bytes,
            total_pg_fault=stats.page_faults,
            total_pg_maj_fault=stats.major_faults,
            total_inactive_file=stats.inactive_file_bytes,
            usage=c.MemoryEntryV1(
                limit=stats.memory_limit_bytes or _UNLIMITED, usage=stats.memory_bytes, failcnt=stats.oom_kills
            ),
        ),
    )


def _version_2(stats: StatsResponse) -> c.MetricsV2:
    return c.MetricsV2(
        pids=c.PidsStat(current=stats.pids, limit=stats.pids_limit),
        cpu=c.CpuStatV2(
            usage_usec=stats.cpu_us,
            user_usec=stats.cpu_user_us,
            system_usec=stats.cpu_system_us,
            nr_periods=stats.cpu_periods,
            nr_throttled=stats.cpu_throttled,
            throttled_usec=stats.cpu_throttled_us,
        ),
        memory=c.MemoryStatV2(
            anon=stats.anon_bytes,
            inactive_file=stats.inactive_file_bytes,
            pgfault=stats.page_faults,
            pgmajfault=stats.major_faults,
            usage=stats.memory_bytes,
            usage_limit=stats.memory_limit_bytes or stats.guest_memory_bytes,
        ),
    )
