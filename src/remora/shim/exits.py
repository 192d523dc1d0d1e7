"""How ends of processes become known: waited for in the guest, told to containerd in the order that it relies on.

Output first, then the execs of a container, then the container itself; the sandbox last of all. Whatever happens to the
guest, every process that was started gets exactly one end.
"""

from __future__ import annotations

import threading
import time

from remora.errors import ProtocolError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.shim.events import Publisher, timestamp
from remora.shim.oom import OomEvents
from remora.shim.pod import Pod
from remora.shim.task import KILLED, Process, Task
from remora.wire import containerd as c

#: Output may take so long after the end: a child that inherited it may keep it open for ever.
DRAIN_S = 2.0
#: A microVM that ends takes its control connection along, and is known to have ended within so long.
_LOST_S = 1.0
#: Of a process (wait(2)); 128 and the signal is less.
_MOST_STATUS = 255


class Exits:
    """Reactor's thread only, but for `watch`."""

    def __init__(self, reactor: Reactor, publisher: Publisher, pod: Pod, ooms: OomEvents) -> None:
        self._reactor = reactor
        self._publisher = publisher
        self._pod = pod
        self._ooms = ooms

    def watch(self, task: Task, process: Process) -> None:
        """Wait for the end of a process that has been started, in a thread of its own."""
        thread = threading.Thread(target=self._wait, args=(task, process), name="wait", daemon=True)
        thread.start()

    def _wait(self, task: Task, process: Process) -> None:
        status, oom_kills = KILLED, 0
        try:
            ended = self._pod.vm.guest.wait(process.guest_id, drain_s=DRAIN_S)
            oom_kills = ended.oom_kills
            if 0 <= ended.exit_status <= _MOST_STATUS:  # a guest may say anything
                status = ended.exit_status
            process.exited_ns = time.time_ns()
            if not process.exec_id:
                self._pod.bring_back(task)
        except (ProtocolError, UnavailableError):
            # Its processes go with it. One that has only broken off is ended: nobody knows any more what it does.
            self._reactor.post(lambda: self._lost(process))
        except RemoraError:
            pass  # an answer as well: it knows of no such process
        self._reactor.post(lambda: self._ended(task, process, status, oom_kills))

    def _lost(self, process: Process) -> None:
        why = f"the guest has broken off control while {process.guest_id} ran"
        self._reactor.call_later(_LOST_S, lambda: self._pod.give_up(why))

    def killed(self, process: Process) -> None:
        """A process has been sent SIGKILL: see that it ends, whatever its guest says. Reactor's thread only."""

        def look() -> None:
            if process.runs:
                self._pod.give_up(f"{process.guest_id} goes on {self._pod.kill_timeout_s:g} s after SIGKILL")

        self._reactor.call_later(self._pod.kill_timeout_s, look)

    def _ended(self, task: Task, process: Process, status: int, oom_kills: int) -> None:
        process.exited_ns = process.exited_ns or time.time_ns()
        process.streams.when_drained(lambda: self._drained(task, process, status, oom_kills), DRAIN_S)

    def _drained(self, task: Task, process: Process, status: int, oom_kills: int) -> None:
        if process.exec_id:
            self._tell(process, status)
            return
        waiting = [one for one in task.execs.values() if one.runs]

        def last() -> None:
            if process.exited:
                return
            for one in task.execs.values():
                if one.runs:
                    self._tell(one, KILLED)
            self._ooms.tell(task, oom_kills)
            self._tell(process, status)

        if not waiting:
            last()
            return
        # The guest has killed them; their ends are on the way.
        for one in waiting:
            one.when_exited(lambda _one: None if any(e.runs for e in task.execs.values()) else last())
        self._reactor.call_later(DRAIN_S, last)

    def _tell(self, process: Process, status: int) -> None:
        if process.exited:
            return
        process.exited_ns = process.exited_ns or time.time_ns()
        self._publisher.publish(
            c.TaskExit(
                container_id=process.container,
                id=process.exec_id or process.container,
                pid=process.pid,
                exit_status=status,
                exited_at=timestamp(process.exited_ns),
            )
        )
        process.exit(status)

    def never_started(self, task: Task, status: int) -> None:
        """A container was killed before it was started."""
        self._tell(task.process, status)

    def sandbox(self, task: Task, status: int, tasks: dict[str, Task]) -> None:
        """The pod's sandbox was killed: its microVM ends, then every container, then itself."""
        self._pod.kill()
        others = [one for one in tasks.values() if one is not task and one.process.runs]

        def last() -> None:
            for one in others:
                self._tell(one.process, KILLED)
            self._tell(task.process, status)

        if not others:
            last()
            return
        for other in others:
            other.process.when_exited(lambda _one: None if any(o.process.runs for o in others) else last())
        self._reactor.call_later(2 * DRAIN_S, last)

    def machine_ended(self, tasks: dict[str, Task]) -> None:
        """The microVM has ended by itself: containers learn it by their waits, the sandbox here."""
        for task in tasks.values():
            if task.role == "sandbox" and task.process.runs:
                self.sandbox(task, KILLED, tasks)
                return
