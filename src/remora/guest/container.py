"""Starts the container and further processes in it through crun, and knows them by the host's ids.

crun runs detached: it sets the process up, writes its number and exits, and the process becomes a child of PID 1,
which then waits for it directly. Nothing stands between the function and its exit status or its signals.
"""

from __future__ import annotations

import array
import os
import signal
import socket
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
from remora.guest import bundle, rootfs, system, users
from remora.guest.stdio import Stdio
from remora.reactor import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Optional

    from remora.guest.children import Children
    from remora.reactor import Reactor
    from remora.wire.guest_v1 import Process, SetupRequest

MAIN = "main"
#: Ended processes whose status and unread output are kept; a probe every few seconds must not fill the guest.
_MAX_ENDED = 64
_CRUN = ["/usr/bin/crun", "--root", f"{rootfs.BASE}/crun", "--cgroup-manager=cgroupfs"]
CGROUP = "/sys/fs/cgroup" + bundle.CGROUP
#: Signals whose default is not to end the process (signal(7)).
_HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP, signal.SIGTTIN,
             signal.SIGTTOU, signal.SIGSTOP, signal.SIGKILL}  # fmt: skip


class Running:
    """One process of the container, from its start on; its status can be asked for again after its end."""

    def __init__(self, name: str, stdio: Stdio) -> None:
        self.name = name
        self.stdio = stdio
        self.pid = 0
        self.exit_status: Optional[int] = None
        self.oom_killed = False
        #: Set when PID 1 ends it in place of a signal that the kernel would have dropped.
        self.ended_by = 0
        self._waiters: List[Callable[[], None]] = []
        self._finished = False

    def when_finished(self, callback: Callable[[], None]) -> None:
        """Call once: the process has ended and its output has been handed over."""
        if self._finished:
            self.stdio.when_handed_over(callback)
        else:
            self._waiters.append(callback)

    def ended(self, status: int, oom_killed: bool) -> None:
        self.exit_status = 128 + self.ended_by if self.ended_by and status == 128 + signal.SIGKILL else status
        self.oom_killed = oom_killed
        self.stdio.process_ended()
        self.stdio.when_handed_over(self._finish)

    def _finish(self) -> None:
        self._finished = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()


class Container:
    def __init__(self, reactor: Reactor, children: Children, on_started: Callable[[Running], None]) -> None:
        self._reactor = reactor
        self._children = children
        self._on_started = on_started
        self._mounts: Optional[List[Dict[str, Any]]] = None
        self._readonly_root = False
        self._processes: Dict[str, Running] = {}
        self._ended: Deque[Running] = deque()
        self._counter = 0

    # -- life -------------------------------------------------------------------------------------------------------

    def setup(self, request: SetupRequest) -> None:
        if self._mounts is not None:
            raise AlreadyExistsError("the container's root is set up already; a microVM runs one container")
        self._mounts = rootfs.setup(request)
        self._readonly_root = request.readonly_root

    def start(self, name: str, process: Process, done: Callable[[Optional[RemoraError]], None]) -> Running:
        """Start `main`, or in the running container another process; `done` is called when it runs, or could not.

        Raises:
            InvalidArgumentError, AlreadyExistsError, FailedPreconditionError: the request cannot be met now.
        """
        self._check(name, process)
        user = users.find(process.user, rootfs.image_file("/etc/passwd"), rootfs.image_file("/etc/group"))
        stdio = Stdio(self._reactor, terminal=process.terminal, stdin=process.stdin)
        if process.terminal and process.rows and process.columns:
            stdio.resize(process.rows, process.columns)
        running = Running(name, stdio)
        self._processes[name] = running
        description = bundle.process_json(process, user)
        self._counter += 1
        base = f"{rootfs.BASE}/start-{self._counter}"
        arguments = ["--detach", "--pid-file", base + ".pid"]
        if name == MAIN:
            limit = rootfs.container_limit(rootfs.memory_bytes()["MemTotal"])
            config = bundle.config_json(description, self._mounts or [], self._readonly_root, limit)
            system.write_text(f"{rootfs.BUNDLE}/config.json", config)
            command = ["run", "--bundle", rootfs.BUNDLE, *arguments]
        else:
            system.write_text(base + ".json", bundle.encode(description))
            command = ["exec", "--process", base + ".json", *arguments]
        console = _Console(self._reactor, base + ".tty", stdio) if process.terminal else None
        if console is not None:
            command += ["--console-socket", console.path]
        argv = [*_CRUN, "--log", base + ".log", *command, MAIN]
        self._children.starting()
        pid = system.spawn(argv, *stdio.for_child)
        stdio.child_has_them()

        def crun_ended(status: int) -> None:
            if console is not None:
                console.close()
            try:
                error = self._launched(running, base, process.args[0], status)
            finally:
                self._children.started()
            done(error)

        self._children.when_ended(pid, crun_ended)
        return running

    def _check(self, name: str, process: Process) -> None:
        if self._mounts is None:
            raise FailedPreconditionError("the container has no root yet", fix="call Setup first")
        if not process.args or not process.args[0]:
            raise InvalidArgumentError("the process has no command", fix="give at least one argument")
        if name in self._processes:
            raise AlreadyExistsError(f"process id {name!r} is taken")
        if not name or len(name) > 128 or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise InvalidArgumentError(f"process id {name[:140]!r}: 1 to 128 of letters, digits, dot, dash, underscore")
        if name != MAIN:
            main = self._processes.get(MAIN)
            if main is None or not main.pid or main.exit_status is not None:
                raise FailedPreconditionError("the container is not running: nothing can be started in it")

    def _launched(self, running: Running, base: str, command: str, status: int) -> Optional[RemoraError]:
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
        running.stdio.on_interrupt = lambda group, number: self._interrupted(running, group, number)
        kills = oom_kills()

        def ended(exit_status: int) -> None:
            running.ended(exit_status, exit_status == 128 + signal.SIGKILL and oom_kills() > kills)
            running.when_finished(lambda: self._forget_oldest(running))

        self._children.when_ended(running.pid, ended)
        self._on_started(running)
        return None

    def _forget_oldest(self, running: Running) -> None:
        if running.name != MAIN:
            self._ended.append(running)
        if len(self._ended) > _MAX_ENDED:
            oldest = self._ended.popleft()
            del self._processes[oldest.name]
            oldest.stdio.close()

    # -- processes --------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Running:
        running = self._processes.get(name)
        if running is None:
            known = ", ".join(sorted(self._processes)) or "none"
            raise NotFoundError(f"no process has the id {name!r}; known: {known}")
        return running

    def all(self) -> List[Running]:
        return list(self._processes.values())

    def signal(self, name: str, number: int, everyone: bool) -> None:
        """Deliver a signal as if the process were not first in its PID namespace.

        Raises:
            NotFoundError: unknown, or ended.
            InvalidArgumentError: no such signal.
        """
        running = self.find(name)
        if not 0 < number <= 64:
            raise InvalidArgumentError(f"signal {number} is not within 1..64")
        if running.exit_status is not None or not running.pid:
            raise NotFoundError(f"process {name!r} does not run")
        if not everyone:
            self._kill(running, number)
            return
        for pid in cgroup_pids():
            if pid == running.pid:
                self._kill(running, number)
            else:
                _kill_if_there(pid, number)

    def _interrupted(self, running: Running, group: int, number: int) -> None:
        """The terminal has just sent a signal: see that the container's first process obeys it by default."""
        if group == running.pid and running.name == MAIN and running.exit_status is None:
            self._kill(running, number, sent=True)

    def kill_everything(self) -> None:
        try:
            system.write_text(f"{CGROUP}/cgroup.kill", "1")
        except FileNotFoundError:
            pass  # no container was started

    def _kill(self, running: Running, number: int, sent: bool = False) -> None:
        # The kernel drops signals that a namespace's first process has not asked for (pid_namespaces(7)); anywhere
        # else the default would end it. SIGKILL does that here, and the status tells what was meant.
        if running.name == MAIN and number not in _HARMLESS and not _handles(running.pid, number):
            running.ended_by = number
            number = signal.SIGKILL
        elif sent:
            return
        _kill_if_there(running.pid, number)


class _Console:
    """Receives the terminal's descriptor from crun (--console-socket)."""

    def __init__(self, reactor: Reactor, path: str, stdio: Stdio) -> None:
        self.path = path
        self._reactor = reactor
        self._stdio = stdio
        self._connection: Optional[socket.socket] = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(path)
        self._listener.listen(1)
        reactor.register(self._listener.fileno(), READ, self._accept)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            # crun may have sent and exited within one turn of the loop.
            self._listener.setblocking(False)
            if self._connection is None:
                self._accept()
            if self._connection is not None:
                self._receive()
            self._reactor.unregister(self._listener.fileno())
            self._listener.close()
            os.unlink(self.path)

    def _accept(self, _events: int = 0) -> None:
        try:
            self._connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # crun never connected
        self._reactor.register(self._connection.fileno(), READ, self._receive)

    def _receive(self, _events: int = 0) -> None:
        connection = self._connection
        if connection is None or connection.fileno() < 0:
            return
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        self._reactor.unregister(connection.fileno())
        connection.close()
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(data[:4])
                self._stdio.terminal_opened(descriptors[0])


def start_error(command: str, log: str, status: int) -> RemoraError:
    """Return what crun's log says, as the error a caller can act on."""
    text = log.strip().splitlines()[-1] if log.strip() else f"crun ended with status {status}"
    lower = text.lower()
    if "executable file" in lower or "no such file" in lower:
        return NotFoundError(f"cannot start {command!r}: {text}", fix="check the command and the image's PATH")
    if "permission denied" in lower:
        return PermissionDeniedError(f"cannot start {command!r}: {text}", fix="is the file executable for this user?")
    return InternalError(f"cannot start {command!r}: {text}")


def oom_kills() -> int:
    try:
        events = system.read_text(f"{CGROUP}/memory.events")
    except FileNotFoundError:
        return 0
    for line in events.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def cgroup_pids() -> List[int]:
    try:
        return [int(line) for line in system.read_text(f"{CGROUP}/cgroup.procs").split()]
    except FileNotFoundError:
        return []


def _handles(pid: int, number: int) -> bool:
    """Return whether the process catches, ignores or blocks the signal (proc(5), status)."""
    try:
        status = system.read_text(f"/proc/{pid}/status")
    except FileNotFoundError:
        return True
    for line in status.splitlines():
        name, _, mask = line.partition(":")
        if name in ("SigCgt", "SigIgn", "SigBlk") and int(mask, 16) >> (number - 1) & 1:
            return True
    return False


def _kill_if_there(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended, and its status says how
