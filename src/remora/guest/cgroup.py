"""A container's control group in the guest (cgroup v2; Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import os
import time

from remora.guest import system
from remora.wire.guest_pod_v1 import CGROUP_PARENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List

_ROOT = "/sys/fs/cgroup"
#: How long freezing may take; a process in uninterruptible sleep freezes later by itself.
_FREEZE_S = 1.0


def path(container: str) -> str:
    """Return the name that a bundle gives as cgroupsPath."""
    return f"{CGROUP_PARENT}/{container}"


def folder(container: str) -> str:
    return _ROOT + path(container)


def number(container: str, name: str) -> int:
    """Return a file's only number; 0 for `max`, and for a container that was never started."""
    text = _read(container, name).strip()
    return int(text) if text.isdigit() else 0


def table(container: str, name: str) -> Dict[str, int]:
    """Return a file of `key value` lines."""
    return parse(_read(container, name))


def parse(text: str) -> Dict[str, int]:
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            found[key] = int(value)
    return found


def pids(container: str) -> List[int]:
    return [int(line) for line in _read(container, "cgroup.procs").split()]


def oom_kills(container: str) -> int:
    return table(container, "memory.events").get("oom_kill", 0)


def kill(container: str) -> None:
    """End every process of the container."""
    try:
        system.write_text(f"{folder(container)}/cgroup.kill", "1")
    except FileNotFoundError:
        pass  # it was never started


def freeze(container: str, frozen: bool) -> None:
    """Stop all processes of the container, or let them go on; returns once that is so, for `_FREEZE_S` at most."""
    system.write_text(f"{folder(container)}/cgroup.freeze", str(int(frozen)))
    deadline_s = time.monotonic() + _FREEZE_S
    while table(container, "cgroup.events").get("frozen", 0) != int(frozen) and time.monotonic() < deadline_s:
        time.sleep(0.002)


def remove(container: str) -> None:
    try:
        os.rmdir(folder(container))
    except OSError:
        pass  # gone already, or a process is still on its way out of it: an empty directory costs nothing


def _read(container: str, name: str) -> str:
    try:
        return system.read_text(f"{folder(container)}/{name}")
    except OSError:
        return ""
