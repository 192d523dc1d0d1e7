"""Starts a container and further processes in it through crun, and knows them by the host's ids.

crun runs detached: it sets the process up, writes its number and exits, and the process becomes a child of PID 1,
which then waits for it directly. Nothing stands between the function and its exit status or its signals.
"""

from __future__ import annotations

import os
import signal
from collections import deque

from remora.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
)
from remora.guest import cgroup, system
from remora.guest.console import Console
from remora.guest.rootfs import BASE
from remora.guest.running import Running, kill_if_there
from remora.guest.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Deque, Dict, List, Optional

    from remora.guest.children import Children
    from remora.reactor import Reactor

#: Ended processes whose status and unread output are kept; a probe every few seconds must not fill the guest.
_MAX_ENDED = 64
#: The container runtime.
CRUN = ("/usr/bin/crun", "--root", f"{BASE}/crun", "--cgroup-manager=cgroupfs")


class Container:
    """One container. `name` is also the id of its own process; `bundle` is where its config.json lies."""

    def __init__(
        self, reactor: Reactor, children: Children, name: str, bundle: str, on_started: Callable[[Running], None]
    ) -> None:
        check_id(name)
        self.name = name
        self.bundle = bundle
        self._reactor = reactor
        self._children = children
        self._on_started = on_started
        self._processes: Dict[str, Running] = {}
        self._ended: Deque[Running] = deque()
        self._counter = 0
        #: What its group counted before it was started: more than 0 only where one of that name was not quite gone.
        self.kills_before = 0

    # -- life -------------------------------------------------------------------------------------------------------

    @property
    def first(self) -> Optional[Running]:
        """The container's own process, once it is being started."""
        return self._processes.get(self.name)

    def run(self, stdio: Stdio, command: str, done: Callable[[Optional[RemoraError]], None]) -> Running:
        """Start the container's own process from its bundle; `done` is called when it runs, or could not."""
        return self._launch(self.name, stdio, command, ["run", "--bundle", self.bundle], done)

    def exec(
        self, process_id: str, stdio: Stdio, command: str, process: str, done: Callable[[Optional[RemoraError]], None]
    ) -> Running:
        """Start another process, of which `process` is the OCI description as JSON."""
        path = f"{self._base()}.json"
        system.write_text(path, process)
        return self._launch(process_id, stdio, command, ["exec", "--process", path], done)

    def check(self, process_id: str) -> None:
        """Refuse a process that cannot be started now.

        Raises:
            InvalidArgumentError, AlreadyExistsError, FailedPreconditionError
        """
        if process_id in self._processes:
            raise AlreadyExistsError(f"process id {process_id!r} is taken")
        check_id(process_id.rpartition("/")[2])
        if process_id != self.name and (self.first is None or not self.first.alive):
            raise FailedPreconditionError("the container is not running: nothing can be started in it")

    def _base(self) -> str:
        return f"{BASE}/start-{self.name}-{self._counter + 1}"

    def _launch(
        self,
        process_id: str,
        stdio: Stdio,
        command: str,
        action: List[str],
        done: Callable[[Optional[RemoraError]], None],
    ) -> Running:
        running = self._processes[process_id] = Running(process_id, stdio, process_id == self.name)
        base = self._base()
        self._counter += 1
        # Before the process runs: it may meet its limit before crun has ended.
        kills_before = cgroup.oom_kills(self.name)
        if running.first:
            self.kills_before = kills_before
        argv = [*CRUN, "--log", base + ".log", *action, "--detach", "--pid-file", base + ".pid"]
        # A Unix path holds 107 bytes, and a container's name may have 76 of them.
        console = Console(self._reactor, f"{BASE}/{id(running):x}.tty", stdio) if stdio.terminal else None
        if console is not None:
            argv += ["--console-socket", console.path]
        self._children.starting()
        pid = system.spawn([*argv, self.name], *stdio.for_child)
        stdio.child_has_them()

        def crun_ended(status: int) -> None:
            if console is not None:
                console.close()
            try:
                error = self._launched(running, base, command, status, kills_before)
            finally:
                self._children.started()
            done(error)

        self._children.when_ended(pid, crun_ended)
        return running

    def _launched(
        self, running: Running, base: str, command: str, status: int, kills_before: int
    ) -> Optional[RemoraError]:
        pid_text = ""
        if status == 0:
            pid_text = system.read_text(base + ".pid").strip()
        log = ""
        for suffix in (".pid", ".log", ".json"):
            try:
                if suffix == ".log":
                    log = system.read_text(base + suffix)
                os.unlink(base + suffix)
            except FileNotFoundError:
                pass  # crun got no further
        if not pid_text:
            del self._processes[running.name]
            running.stdio.close()
            return start_error(command, log, status)
        running.pid = int(pid_text)
        running.stdio.on_interrupt = running.interrupted

        def ended(exit_status: int) -> None:
            if running.first:
                # In a PID namespace of its own the kernel has done so already.
                cgroup.kill(self.name)
            kills = cgroup.oom_kills(self.name) - kills_before
            running.ended(exit_status, exit_status == 128 + signal.SIGKILL and kills > 0, kills)
            running.when_finished(lambda: self._forget_oldest(running))

        self._children.when_ended(running.pid, ended)
        self._on_started(running)
        return None

    def _forget_oldest(self, running: Running) -> None:
        if not running.first:
            self._ended.append(running)
        if len(self._ended) > _MAX_ENDED:
            oldest = self._ended.popleft()
            del self._processes[oldest.name]
            oldest.stdio.close()

    # -- processes --------------------------------------------------------------------------------------------------

    def find(self, process_id: str) -> Running:
        running = self._processes.get(process_id)
        if running is None:
            known = ", ".join(sorted(self._processes)) or "none"
            raise NotFoundError(f"no process has the id {process_id!r}; known: {known}")
        return running

    def all(self) -> List[Running]:
        return list(self._processes.values())

    def signal(self, process_id: str, number: int, everyone: bool) -> None:
        """Deliver a signal as if the process were not first in its PID namespace.

        Raises:
            NotFoundError: unknown, or ended.
            InvalidArgumentError: no such signal.
        """
        running = self.find(process_id)
        if not 0 < number <= 64:
            raise InvalidArgumentError(f"signal {number} is not within 1..64")
        if not running.alive:
            raise NotFoundError(f"process {process_id!r} does not run")
        if not everyone:
            running.kill(number)
            return
        for pid in cgroup.pids(self.name):
            if pid == running.pid:
                running.kill(number)
            else:
                kill_if_there(pid, number)

    def close(self) -> None:
        """Let go of every process's streams; the processes have ended."""
        for running in self._processes.values():
            running.stdio.close()
        self._processes.clear()


def check_id(name: str) -> None:
    if not name or len(name) > 128 or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InvalidArgumentError(f"process id {name[:140]!r}: 1 to 128 of letters, digits, dot, dash, underscore")


def start_error(command: str, log: str, status: int) -> RemoraError:
    """Return what crun's log says, as the error a caller can act on."""
    text = log.strip().splitlines()[-1] if log.strip() else f"crun ended with status {status}"
    lower = text.lower()
    if "executable file" in lower or "no such file" in lower:
        return NotFoundError(f"cannot start {command!r}: {text}", fix="check the command and the image's PATH")
    if "permission denied" in lower:
        return PermissionDeniedError(f"cannot start {command!r}: {text}", fix="is the file executable for this user?")
    return InternalError(f"cannot start {command!r}: {text}")
