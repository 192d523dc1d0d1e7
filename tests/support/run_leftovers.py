"""What a test run that was killed has left, and its removal at the start of the next: never anything of a live run.

A run is its process, told from a later one of the same number by its start (proc_pid_stat(5)). Each directory that
tests make outside pytest's own holds the mark of whoever made it, with the network interfaces that go with it; each
process that a run starts has the run in its environment; cgroups have its number in their names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "REMORA_TEST_RUN"
_MARK = ".made-by"
_CGROUPS = Path("/sys/fs/cgroup")


def mark_children() -> None:
    """Have whatever this process starts from now on known as its."""
    os.environ[_VARIABLE] = _run_of(os.getpid())


def directory(prefix: str, *links: str) -> Path:
    """Make a temporary directory with a short path. The interfaces `links` go when it is swept."""
    made = Path(tempfile.mkdtemp(prefix=prefix))
    (made / _MARK).write_text(json.dumps({"run": _run_of(os.getpid()), "links": links}))
    return made


def sweep() -> list[str]:
    """Remove what runs that are over have left; return a line for each thing."""
    found = [f"process {pid}" for pid in _processes() if _kill(pid)]
    for made, links in _directories():
        found.append(f"directory {made}")
        for link in links:
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split(" ")[1]
            if target.startswith(f"{made}/"):
                subprocess.run(["umount", "-l", target], capture_output=True, check=False)
        shutil.rmtree(made, ignore_errors=True)
    for group in _cgroups():
        found.append(f"cgroup {group}")
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return found


def _run_of(pid: int) -> str:
    """Return `<pid>-<start>`; nothing if there is no such process, or only what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "XZ" else f"{pid}-{fields[19]}"


def _is_over(run: str) -> bool:
    pid, _, start = run.partition("-")
    return pid.isdecimal() and start.isdecimal() and _run_of(int(pid)) != run


def _processes() -> Iterator[int]:
    """Processes of runs that are over; those in their cgroups as well, whose environment is a container's."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for entry in (process / "environ").read_bytes().split(b"\0"):
                if entry.startswith(f"{_VARIABLE}=".encode()) and _is_over(entry.partition(b"=")[2].decode()):
                    yield int(process.name)
    for group in _cgroups():
        for folder, _, _ in os.walk(group):
            with contextlib.suppress(OSError):
                yield from map(int, Path(folder, "cgroup.procs").read_text().split())


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def _directories() -> Iterator[tuple[Path, list[str]]]:
    for mark in Path(tempfile.gettempdir()).glob(f"*/{_MARK}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = json.loads(mark.read_text())
            if _is_over(told["run"]):
                yield mark.parent, told["links"]


def _cgroups() -> Iterator[Path]:
    """Groups `remora-test-<pid>` and `remora-test-<pid>-<index>` whose number no process has."""
    for pattern in ("remora-test-*", "*/remora-test-*"):
        for group in _CGROUPS.glob(pattern):
            pid = group.name.split("-")[2]
            if pid.isdecimal() and not _run_of(int(pid)):
                yield group
