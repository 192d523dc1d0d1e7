"""Puts a pod's processes into the pod's control group, on hosts of either cgroup version.

The kubelet reads the pod's use there, and bounds it there; so the shim goes in before the microVM takes its memory,
and the monitor is born inside.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
#: Hierarchies of version 1 that count or bound what a microVM uses. cpuset and devices would need settings first.
_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "blkio")


def relative(cgroups_path: str) -> str:
    """Return config.json's cgroupsPath as a path below a hierarchy; systemd's `slice:prefix:name` is resolved."""
    if ":" not in cgroups_path:
        return cgroups_path.strip("/")
    slice_name, prefix, name = cgroups_path.split(":", 2)
    # a-b.slice lies in a.slice (systemd.slice(5)).
    parts = slice_name.removesuffix(".slice").split("-")
    slices = ["-".join(parts[: count + 1]) + ".slice" for count in range(len(parts))]
    return "/".join([*slices, f"{prefix}-{name}.scope"])


def join(cgroups_path: str) -> None:
    """Move this process into the group, made if need be."""
    if not cgroups_path:
        return
    inside = relative(cgroups_path)
    for base in _hierarchies():
        folder = base / inside
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            # A controller that this host does not delegate bounds nothing here; the others still do.
            with contextlib.suppress(OSError):
                folder.rmdir()


def existing(cgroups_path: str) -> list[str]:
    """Return the directories of a group that are there, for `remove`."""
    if not cgroups_path:
        return []
    folders = (base / relative(cgroups_path) for base in _hierarchies())
    return [str(folder) for folder in folders if folder.is_dir()]


def remove(folders: list[str]) -> None:
    """Remove the groups; one in which a process still ends stays for the next caller."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def is_unified() -> bool:
    """True on a host of version 2 alone."""
    return (ROOT / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    if is_unified():
        return [ROOT]
    return [ROOT / name for name in _CONTROLLERS if (ROOT / name).is_dir()]
