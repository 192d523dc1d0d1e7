"""New limits for a container that runs: as its guest takes them, and refused where its microVM can never give so much.

A microVM machine has no hot-plug of memory and processors: it stays as large as it was booted.
"""

from __future__ import annotations

from typing import Any

from remora.errors import ResourceExhaustedError
from remora.shim import spec
from remora.shim.settings import GUEST_OVERHEAD_MIB, Size

_MIB = 1 << 20
#: Linux' own.
_PERIOD_US = 100_000


def guest_update(resources: dict[str, Any], now: dict[str, Any], size: Size) -> dict[str, Any]:
    """Return the limits to set in the guest, `linux.resources` as OCI has it; empty: there is nothing to change.

    Args:
        resources: What is asked for.
        now: What the container has.

    Raises:
        ResourceExhaustedError: a limit is raised beyond what the microVM has.
    """
    memory, had = _memory(resources), _memory(now)
    room = (size.memory_mib - GUEST_OVERHEAD_MIB) * _MIB
    if memory > max(room, had):
        raise ResourceExhaustedError(
            f"a memory limit of {memory / _MIB:.0f} MiB is more than the pod's microVM has for containers: "
            f"{room // _MIB} of its {size.memory_mib} MiB, and it cannot grow while it runs",
            fix="make the pod anew with that limit, or with room for it from the start (annotation io.remora.memory)",
        )
    cpus = _cpus(resources)
    if cpus > max(size.cpus, _cpus(now)):
        raise ResourceExhaustedError(
            f"a limit of {cpus:g} CPUs is more than the pod's microVM has: {size.cpus}, and it gets no more while it "
            "runs",
            fix="make the pod anew with that limit, or with as many from the start (annotation io.remora.cpus)",
        )
    kept = spec.guest_resources(resources)
    quota = (resources.get("cpu") or {}).get("quota") or 0
    if quota < 0:
        # At the start no limit is said by none; here it takes the old one away. crun looks at it beside a period only.
        kept["cpu"] = {"period": _PERIOD_US, **kept.get("cpu", {}), "quota": -1}
    return {key: value for key, value in kept.items() if value}


def merged(now: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Return what the container has once the change is made."""
    both = dict(now)
    for key, value in changed.items():
        both[key] = {**(now.get(key) or {}), **value} if isinstance(value, dict) else value
    return both


def _memory(resources: dict[str, Any]) -> int:
    return int((resources.get("memory") or {}).get("limit") or 0)


def _cpus(resources: dict[str, Any]) -> float:
    cpu = resources.get("cpu") or {}
    return int(cpu.get("quota") or 0) / (int(cpu.get("period") or 0) or _PERIOD_US)
