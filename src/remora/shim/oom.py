"""Tells containerd of processes that were killed for want of memory, also while their container goes on.

The guest is asked and answers once it has news (guest/oom.py), one question at a time: so a guest decides neither how
often it is heard nor, as ids of other pods' containers are nobody's here, of whom it speaks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.shim.events import Publisher
from remora.shim.pod import Pod
from remora.shim.task import Task
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1

#: Kills that follow one another faster are one event of their container.
INTERVAL_S = 1.0
#: While so many events wait for containerd, it is not told of kills: ends of processes need the room.
MOST_WAITING = 256


class OomEvents:
    def __init__(self, reactor: Reactor, publisher: Publisher, pod: Pod, tasks: Mapping[str, Task]) -> None:
        self._reactor = reactor
        self._publisher = publisher
        self._pod = pod
        self._tasks = tasks
        self._watching = False

    def watch(self) -> None:
        """Begin to ask the guest, in a thread of its own; harmless if that was done before. Reactor's thread only."""
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._ask, name="oom", daemon=True).start()

    def tell(self, task: Task, kills: int) -> None:
        """Tell containerd of a container's kills, unless it knows of so many. Reactor's thread only."""
        if kills > task.oom_kills and not task.process.exited:
            task.oom_kills = kills
            self._publisher.publish(c.TaskOOM(container_id=task.id))

    def _ask(self) -> None:
        seen = 0
        try:
            while True:
                answer = self._pod.vm.pod("OomKills", v1.OomKillsRequest(seen=seen), None)
                seen = answer.number
                # The last one counts; of a guest's own inventions nothing is kept.
                self._later({one.id: one.kills for one in answer.containers if one.id in self._tasks})
                time.sleep(INTERVAL_S)
                while self._publisher.waiting > MOST_WAITING:
                    time.sleep(INTERVAL_S)
        except RemoraError:
            return  # the guest has ended, or is one that does not know the question

    def _later(self, kills: dict[str, int]) -> None:
        def tell() -> None:
            for container, count in kills.items():
                task = self._tasks.get(container)
                if task is not None:
                    self.tell(task, count)

        self._reactor.post(tell)
