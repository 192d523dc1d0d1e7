"""containerd's view of processes: a container's own and its execs, their states, and whoever waits for them.

All state changes happen in the reactor's thread, so that events leave in the order that containerd relies on: started
before ended, execs before the container, output before the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from remora.shim.streams import Streams
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1

#: What ended by a machine's end is reported with: as killed.
KILLED = 137
#: What shells say of a command that could not be executed.
NOT_EXECUTED = 127


class Process:
    """A container's own process (`exec_id` empty), or an exec."""

    def __init__(self, container: str, exec_id: str, streams: Streams) -> None:
        self.container = container
        self.exec_id = exec_id
        self.streams = streams
        self.status = c.CREATED
        self.pid = 0
        self.exit_status = 0
        self.exited_ns = 0
        #: The OCI process of an exec.
        self.spec: dict[str, Any] = {}
        self._waiters: list[Callable[[Process], None]] = []

    @property
    def guest_id(self) -> str:
        return f"{self.container}/{self.exec_id}" if self.exec_id else self.container

    @property
    def exited(self) -> bool:
        return self.status == c.STOPPED

    @property
    def runs(self) -> bool:
        return self.status in (c.RUNNING, c.PAUSED)

    def when_exited(self, callback: Callable[[Process], None]) -> None:
        """Call once the process has ended and that was told; at once if it has."""
        if self.exited:
            callback(self)
        else:
            self._waiters.append(callback)

    def exit(self, status: int) -> None:
        """Note the end; the event is out already."""
        self.status = c.STOPPED
        self.exit_status = status
        self.exited_ns = self.exited_ns or time.time_ns()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter(self)


class Task:
    """A container of the pod."""

    def __init__(self, container: str, bundle: str, role: str, process: Process) -> None:
        self.id = container
        self.bundle = bundle
        #: `sandbox`, `container` or `single` (spec.py).
        self.role = role
        self.process = process
        self.execs: dict[str, Process] = {}
        self.config: dict[str, Any] = {}
        #: Names of files that go back to the host at the end.
        self.returned: list[Any] = []
        #: The guest knows the container.
        self.in_guest = False
        #: Processes killed for want of memory of which containerd knows.
        self.oom_kills = 0
        #: What it used when the guest was last asked.
        self.stats = v1.StatsResponse()

    def find(self, exec_id: str) -> Process | None:
        return self.execs.get(exec_id) if exec_id else self.process


def start_request(task: Task) -> v1.StartRequest:
    """Return what the guest is asked to start a container with."""
    streams = task.process.streams
    args = (task.config.get("process") or {}).get("args") or [""]
    return v1.StartRequest(id=task.id, terminal=streams.terminal, stdin=bool(streams.paths[0]), command=args[0])


def exec_request(process: Process) -> v1.ExecRequest:
    """Return what the guest is asked to run beside a container."""
    streams = process.streams
    # crun takes the size of a terminal from here, and a terminal of none from a resize.
    described = {**process.spec, "terminal": streams.terminal}
    return v1.ExecRequest(
        id=process.guest_id,
        process=json.dumps(described).encode(),
        terminal=streams.terminal,
        stdin=bool(streams.paths[0]),
        command=process.spec["args"][0],
    )
