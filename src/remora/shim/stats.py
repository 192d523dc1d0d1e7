"""A container's use of the guest as the metrics that containerd's host version expects.

containerd asks one shim after the other, for the kubelet's view of the whole node. So a guest that does not answer may
not keep it: what that one said last stands until it speaks again.
"""

from __future__ import annotations

import time
from typing import Any

from remora.errors import DeadlineExceededError
from remora.shim.cgroups import is_unified
from remora.shim.pod import Pod
from remora.shim.task import Task
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.messages import Any as AnyMessage

#: What cgroup version 1 shows where there is no limit.
_UNLIMITED = (1 << 63) - 4096
#: A guest that is up answers within milliseconds; one under emulation on a busy host may take longer.
ANSWER_S = 3.0
#: So long a guest that has not answered is not asked again.
SILENT_S = 30.0


class Usage:
    """What is asked of a guest for all containers of the node in turn. Any thread."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._silent_until_s = 0.0

    def stats(self, task: Task) -> AnyMessage:
        """Return a container's metrics; all 0 of one that is not in the guest."""
        stats: v1.StatsResponse | None = self._ask("Stats", task)
        if stats is not None:
            task.stats = stats
        return metrics(task.stats)

    def pids(self, task: Task) -> list[int]:
        """Return the container's processes by their numbers in the guest; the microVM's where that says nothing.

        Never none: a containerd that restarts takes a task without processes for one that was never created.
        """
        found: v1.PidsResponse | None = self._ask("Pids", task) if task.process.runs else None
        return list(found.pids if found is not None else ()) or [task.process.pid]

    def _ask(self, method: str, task: Task) -> Any:
        """Return the guest's answer; None where there is none."""
        if not task.in_guest or time.monotonic() < self._silent_until_s:
            return None
        try:
            return self._pod.vm.pod(method, v1.ContainerRequest(id=task.id), ANSWER_S)
        except DeadlineExceededError:
            self._silent_until_s = time.monotonic() + SILENT_S
            return None


def metrics(stats: v1.StatsResponse, *, unified: bool | None = None) -> AnyMessage:
    """Return the stats in the form of the host's cgroup version: what reads them may know only that one."""
    if is_unified() if unified is None else unified:
        return _any(c.METRICS_V2_URL, _version_2(stats))
    return _any(c.METRICS_V1_URL, _version_1(stats))


def _any(url: str, message: Message) -> AnyMessage:
    return AnyMessage(type_url=url, value=b"".join(message.encode()))


def _version_1(stats: v1.StatsResponse) -> c.MetricsV1:
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


def _version_2(stats: v1.StatsResponse) -> c.MetricsV2:
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
