"""Tells the host when the kernel kills processes of a container for want of memory, while the container goes on.

The kernel marks a group's memory.events as changed (cgroup-v2.rst: "a file modified event"), so that nothing is asked
before there is something to know. It counts both kinds there: a container at its own limit, and a victim of a guest
that has no memory left at all. The host asks, and is answered when there is news; what happens meanwhile comes
together, with the next question.
"""

from __future__ import annotations

import os
import select

from remora.errors import AbortedError
from remora.guest import cgroup
from remora.wire.guest_pod_v1 import OomKills, OomKillsResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Optional, Tuple

    from remora.reactor import Reactor
    from remora.wire.ttrpc.calls import Call


class OomWatch:
    """The kills in each container that is watched."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._files: Dict[str, int] = {}
        self._before: Dict[str, int] = {}
        #: Of each container with kills: their number among all, and how many.
        self._kills: Dict[str, Tuple[int, int]] = {}
        self._number = 0
        self._waiting: Optional[Tuple[Call, int]] = None

    def watch(self, container: str, before: int) -> None:
        """Look at a container that has just been started; `before`: kills that its group counted until then."""
        try:
            fd = os.open(f"{cgroup.folder(container)}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # it has ended and is gone
        self._files[container] = fd
        self._before[container] = before
        self._reactor.register(fd, select.EPOLLPRI, lambda _events: self._look(container))
        # The first ones may have come before anybody looked.
        self._look(container)

    def forget(self, container: str) -> None:
        self._kills.pop(container, None)
        fd = self._files.pop(container, -1)
        if fd >= 0:
            self._reactor.unregister(fd)
            os.close(fd)

    def answer(self, call: Call, seen: int) -> None:
        """Answer now or once there are kills beyond `seen`; one caller at a time."""
        waiting, self._waiting = self._waiting, (call, seen)
        if waiting is not None:
            waiting[0].fail(AbortedError("another call waits for kills now"))
        self._tell()

    def _look(self, container: str) -> None:
        fd = self._files[container]
        try:
            # Reading is what takes the mark away.
            text = os.pread(fd, 4096, 0).decode()
        except OSError:
            # The group is gone, which marks the file for good.
            self._reactor.unregister(fd)
            return
        kills = cgroup.parse(text).get("oom_kill", 0) - self._before[container]
        if kills > self._kills.get(container, (0, 0))[1]:
            self._number += 1
            self._kills[container] = (self._number, kills)
            self._tell()

    def _tell(self) -> None:
        if self._waiting is None:
            return
        call, seen = self._waiting
        news = [OomKills(id=name, kills=kills) for name, (number, kills) in self._kills.items() if number > seen]
        if news:
            self._waiting = None
            call.respond(OomKillsResponse(number=self._number, containers=news))
