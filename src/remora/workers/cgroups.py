"""Bounds on a worker's memory, processes and processor time that hold for all it does: control groups.

Both kinds are served: version 2, where one directory has all controllers, and version 1, where each has a tree of its
own. The agent makes its groups below the one it is in, so whatever bounds the agent bounds its workers, too, and a
service manager that delegates that group (systemd: `Delegate=yes`) is not gone around. Where groups cannot be made
(no rights, a read-only mount) resource limits alone apply: `detect` says so, and why.

    <own group>/remora-<pid>-<start time>-0/w7/    one agent's groups; what a dead agent left is found by these names
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

CONTROLLERS = ("memory", "pids", "cpu")
_PERIOD_US = 100_000
_NAME = re.compile(r"remora-(\d+)-(\d+)-\d+")
_LEAF = re.compile(r"remora-agent-(\d+)-(\d+)")
_REMOVE_S = 2.0
#: Of the groups that one process makes.
_serial = count()


@dataclass(frozen=True)
class Bounds:
    """What one worker may use; 0 is no bound."""

    memory_bytes: int = 0
    processes: int = 0
    cpus: float = 0.0


def files_for(bounds: Bounds, version: int) -> dict[str, list[tuple[str, str]]]:
    """Return what to write for each controller: (file, value) in order. Missing files are left out by the writer."""
    memory, processes, cpu = "max", "max", "max"
    if bounds.memory_bytes:
        memory = str(bounds.memory_bytes)
    if bounds.processes:
        processes = str(bounds.processes)
    if bounds.cpus:
        cpu = str(max(1000, int(bounds.cpus * _PERIOD_US)))
    if version == 2:
        return {
            # Without swap the bound is one on memory; with oom.group no half of a worker survives.
            "memory": [("memory.max", memory), ("memory.swap.max", "0"), ("memory.oom.group", "1")],
            "pids": [("pids.max", processes)],
            "cpu": [("cpu.max", f"{cpu} {_PERIOD_US}")],
        }
    unlimited = {"max": "-1"}
    return {
        "memory": [
            ("memory.limit_in_bytes", unlimited.get(memory, memory)),
            ("memory.memsw.limit_in_bytes", unlimited.get(memory, memory)),
        ],
        "pids": [("pids.max", processes)],
        "cpu": [("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", unlimited.get(cpu, cpu))],
    }


def own_directories(mountinfo: str, membership: str) -> tuple[int, dict[str, Path]]:
    """Return the version (0: no control groups) and this process's directory per controller.

    Args:
        mountinfo: Text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
        membership: Text of /proc/self/cgroup (cgroups(7)).
    """
    own: dict[str, str] = {}
    for line in membership.splitlines():
        _number, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    version_1: dict[str, Path] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount = fields[3], Path(fields[4])
        if kind[0] == "cgroup2":
            unified = _inside(mount, root, own.get("", "/"))
        elif kind[0] == "cgroup":
            for name in set(kind[2].split(",")) & set(CONTROLLERS):
                version_1[name] = _inside(mount, root, own.get(name, "/"))
    if unified is not None and "memory" in _text(unified / "cgroup.controllers").split():
        return 2, dict.fromkeys(CONTROLLERS, unified)
    return (1, version_1) if version_1 else (0, {})


def _inside(mount: Path, root: str, own: str) -> Path:
    """Return where a group lies below a mount that may show only a part of the tree, as in containers."""
    relative = own.removeprefix(root.rstrip("/")) if own.startswith(root) else own
    found = mount / relative.lstrip("/")
    return found if found.is_dir() else mount


class Group:
    """One worker's groups. `join_files` are what a process writes 0 to, to enter them."""

    def __init__(self, version: int, directories: Mapping[str, Path]) -> None:
        self._version = version
        self._directories = directories

    @property
    def join_files(self) -> list[str]:
        return sorted({str(directory / "cgroup.procs") for directory in self._directories.values()})

    def bound(self, bounds: Bounds) -> None:
        """Set the bounds.

        Raises:
            OSError: the kernel refuses one.
        """
        wanted = files_for(bounds, self._version)
        for controller, directory in self._directories.items():
            for name, value in wanted[controller]:
                if (directory / name).exists():
                    _write(directory / name, value)

    def out_of_memory(self) -> bool:
        """True if the kernel killed one of its processes for the memory bound."""
        directory = self._directories.get("memory")
        if directory is None:
            return False
        text = _text(directory / ("memory.events" if self._version == 2 else "memory.oom_control"))
        counts = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
        return int(counts.get("oom_kill", "0")) > 0

    def remove(self) -> bool:
        """Remove the groups; False if processes are left in one, which are killed."""
        removed = [_remove(directory) for directory in set(self._directories.values())]
        return all(removed)


class Groups:
    """One agent's groups."""

    def __init__(self, version: int, directories: Mapping[str, Path], name: str) -> None:
        self.version = version
        self._above = dict(directories)
        self._own = {controller: directory / name for controller, directory in directories.items()}

    @property
    def controllers(self) -> tuple[str, ...]:
        return tuple(self._own)

    def create(self, worker: str) -> Group:
        """Make the groups of one worker, without bounds.

        Raises:
            OSError: the kernel refuses.
        """
        made = {controller: directory / worker for controller, directory in self._own.items()}
        for directory in dict.fromkeys(made.values()):
            directory.mkdir(exist_ok=True)
        return Group(self.version, made)

    def close(self) -> None:
        """Remove everything, waiting for a moment until processes that were killed are gone."""
        end_s = time.monotonic() + _REMOVE_S
        left = set(self._own.values())
        while left := {directory for directory in left if not _remove_tree(directory)}:
            if time.monotonic() > end_s:
                return
            time.sleep(0.01)

    def sweep(self) -> int:
        """Remove the groups of agents that are dead, with whatever still runs in them; returns how many there were."""
        swept = 0
        for directory in set(self._above.values()):
            with contextlib.suppress(OSError):
                for name in os.listdir(directory):
                    found = _NAME.fullmatch(name) or _LEAF.fullmatch(name)
                    if found and start_time(int(found[1])) != int(found[2]):
                        _remove_tree(directory / name)
                        swept += 1
        return swept


def detect() -> Groups | str:
    """Return the groups of this process, swept and ready, or the reason why there are none."""
    mountinfo, membership = _text(Path("/proc/self/mountinfo")), _text(Path("/proc/self/cgroup"))
    version, directories = own_directories(mountinfo, membership)
    if not directories:
        return "no control groups are mounted"
    name = f"remora-{os.getpid()}-{start_time(os.getpid())}-{next(_serial)}"
    usable: dict[str, Path] = {}
    problem = ""
    try:
        if version == 2:
            _delegate(directories["memory"])
        for controller, directory in directories.items():
            (directory / name).mkdir(exist_ok=True)
            usable[controller] = directory
        if version == 2:
            _write(directories["memory"] / name / "cgroup.subtree_control", _enable(directories["memory"] / name))
    except OSError as error:
        problem = f"{error.filename or 'control groups'}: {error.strerror}"
    if "memory" not in usable or (problem and version == 2):
        for directory in set(usable.values()):
            _remove(directory / name)
        return problem or "there is no memory controller"
    groups = Groups(version, usable, name)
    groups.sweep()
    return groups


def _enable(directory: Path) -> str:
    there = _text(directory / "cgroup.controllers").split()
    return " ".join(f"+{name}" for name in CONTROLLERS if name in there)


def _delegate(own: Path) -> None:
    """Let groups below ours have controllers; for that no process may be in ours but below it (version 2)."""
    control = own / "cgroup.subtree_control"
    if {"memory", "pids"} <= set(_text(control).split()):
        return
    try:
        _write(control, _enable(own))
    except OSError as error:
        if error.errno != errno.EBUSY or _text(own / "cgroup.procs").split() != [str(os.getpid())]:
            raise
        leaf = own / f"remora-agent-{os.getpid()}-{start_time(os.getpid())}"
        leaf.mkdir(exist_ok=True)
        _write(leaf / "cgroup.procs", "0")
        _write(control, _enable(own))


def start_time(pid: int) -> int:
    """Return when a process started (clock ticks since boot), 0 if there is none: with the pid it names it for good."""
    text = _text(Path("/proc", str(pid), "stat"))
    return int(text.rpartition(")")[2].split()[19]) if text else 0


def _remove_tree(directory: Path) -> bool:
    try:
        children: Sequence[Path] = [path for path in directory.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    removed = [_remove_tree(child) for child in children]
    return all(removed) and _remove(directory)


def _remove(directory: Path) -> bool:
    for _attempt in range(2):
        try:
            directory.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            for pid in _text(directory / "cgroup.procs").split():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
        else:
            return True
    return False


def _write(path: Path, value: str) -> None:
    path.write_text(value)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
