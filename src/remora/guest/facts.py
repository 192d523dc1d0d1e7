"""What the host may ask about the guest: resource use, and the hardware it sees."""

from __future__ import annotations

import os
import stat

from remora.guest import cgroup, rootfs, system
from remora.guest.containers import MAIN
from remora.wire.guest_v1 import DevicesResponse, StatsResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

_BUSES = ("virtio", "pci", "platform")


def stats() -> StatsResponse:
    """Return the container's use by its cgroup (cgroup-v2.rst), and the guest's memory."""
    memory = rootfs.memory_bytes()
    limit = cgroup.number(MAIN, "memory.max")
    return StatsResponse(
        memory_bytes=cgroup.number(MAIN, "memory.current"),
        memory_limit_bytes=limit or memory["MemTotal"],
        cpu_us=cgroup.table(MAIN, "cpu.stat").get("usage_usec", 0),
        processes=cgroup.number(MAIN, "pids.current"),
        uptime_s=float(system.read_text("/proc/uptime").split()[0]),
        guest_memory_total_bytes=memory["MemTotal"],
        guest_memory_available_bytes=memory["MemAvailable"],
    )


def devices(dev: str) -> DevicesResponse:
    """Return what is on the guest's buses, and the device nodes below `dev`, the container's /dev."""
    found = []
    for bus in _BUSES:
        folder = f"/sys/bus/{bus}/devices"
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                driver = f"{folder}/{name}/driver"
                bound = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else "-"
                found.append(f"{bus}:{name}:{bound}")
    uname = os.uname()
    return DevicesResponse(devices=found, nodes=_nodes(dev, "/dev"), kernel=f"{uname.sysname} {uname.release}")


def _nodes(folder: str, shown: str) -> List[str]:
    found = []
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        mode = os.lstat(path).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            found.append(f"{shown}/{name}")
        elif stat.S_ISDIR(mode):
            found += _nodes(path, f"{shown}/{name}")
    return found
