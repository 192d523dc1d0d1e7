"""Removes what a dead sandbox has left, however it died.

Three callers, one function: the monitor at its own end, the keeper when the monitor was killed, and every later command
when both were. It may run twice; the second time finds nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import Any

from remora.errors import RemoraError
from remora.sandboxes.jailing import jail_of
from remora.sandboxes.registry import KEPT_FILES, Record, Registry, write_state
from remora.vmm import jail as jails

#: How long a killed machine may take to give its memory back.
KILLED_S = 10.0


def clear(directory: Path, fields: dict[str, Any], *, reason: str = "") -> None:
    """End the sandbox's QEMU, take it off the agent, and remove its files.

    A detached sandbox keeps its record and its output until `remora rm`; `reason` is then noted as what ended it.
    """
    _kill_machine(fields, directory)
    _detach(fields)
    jail = jail_of(fields)
    if jail is not None:
        jails.remove(jail)
    if not fields.get("detached"):
        Registry(directory.parent.parent).remove(directory)
        return
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(directory)):
            if entry.name not in KEPT_FILES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
    if fields.get("state") != "exited" and directory.exists():
        fields = {**fields, "state": "exited", "exit_status": fields.get("exit_status", 137)}
        fields.setdefault("error", reason)
        write_state(Record(str(fields.get("id", directory.name)), directory, fields))


def sweep(registry: Registry) -> int:
    """Clear every sandbox that no living process owns; returns how many there were."""
    count = 0
    for directory, fields in registry.dead():
        clear(directory, fields, reason="the processes that looked after it were killed")
        count += 1
    return count


def _kill_machine(fields: dict[str, Any], directory: Path) -> None:
    """QEMU dies with its monitor by itself; this is for the moment in which it has not yet."""
    pid = fields.get("machine_pid")
    if not pid:
        return
    with contextlib.suppress(OSError):
        started = process_start(int(pid))
        # The same process and not a later one with its number.
        if started == fields.get("machine_started"):
            os.kill(int(pid), signal.SIGKILL)
            _wait_for_end(int(pid))


def _wait_for_end(pid: int) -> None:
    """Wait until a killed process has ended: a jail cannot be removed while somebody is in it."""
    pidfd = os.pidfd_open(pid)
    try:
        select.select([pidfd], [], [], KILLED_S)
    finally:
        os.close(pidfd)


def process_start(pid: int) -> str:
    """Return when a process began (clock ticks since boot): with its pid it names the process for good."""
    with open(f"/proc/{pid}/stat") as stat:
        # The command may contain spaces and parentheses; fields are counted from behind it (proc(5), field 22).
        return stat.read().rpartition(")")[2].split()[19]


def _detach(fields: dict[str, Any]) -> None:
    control = fields.get("control_socket")
    if not control or not os.path.exists(control):
        return
    from remora.sandboxes.agent_link import detach

    # An agent that is gone or refuses holds nothing of ours that it would not drop with the sandbox's directory.
    with contextlib.suppress(RemoraError):
        detach(Path(control), str(fields["id"]), keep_sessions=bool(fields.get("saved")))
