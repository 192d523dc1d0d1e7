"""The one container of a function (`remora run`): its root from disks, its bundle made from what the host wants."""

from __future__ import annotations

from remora.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, RemoraError
from remora.guest import bundle, rootfs, system, users
from remora.guest.containers import MAIN
from remora.guest.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from remora.guest.container import Container
    from remora.guest.containers import Containers
    from remora.guest.running import Running
    from remora.reactor import Reactor
    from remora.wire.guest_v1 import Process, SetupRequest


class Single:
    def __init__(self, reactor: Reactor, containers: Containers) -> None:
        self._reactor = reactor
        self._containers = containers
        self._container: Optional[Container] = None
        self._mounts: List[Dict[str, Any]] = []
        self._readonly_root = False

    def setup(self, request: SetupRequest) -> None:
        if self._container is not None:
            raise AlreadyExistsError("the container's root is set up already; a function's microVM runs one container")
        self._mounts = rootfs.setup(request)
        self._readonly_root = request.readonly_root
        self._container = self._containers.add(MAIN, rootfs.BUNDLE)

    def start(self, name: str, process: Process, done: Callable[[Optional[RemoraError]], None]) -> Running:
        """Start `main`, or in the running container another process; `done` is called when it runs, or could not.

        Raises:
            InvalidArgumentError, AlreadyExistsError, FailedPreconditionError: the request cannot be met now.
        """
        container = self._container
        if container is None:
            raise FailedPreconditionError("the container has no root yet", fix="call Setup first")
        if not process.args or not process.args[0]:
            raise InvalidArgumentError("the process has no command", fix="give at least one argument")
        container.check(name)
        user = users.find(process.user, rootfs.image_file("/etc/passwd"), rootfs.image_file("/etc/group"))
        stdio = Stdio(self._reactor, terminal=process.terminal, stdin=process.stdin)
        if process.terminal and process.rows and process.columns:
            stdio.resize(process.rows, process.columns)
        description = bundle.process_json(process, user)
        if name != MAIN:
            return container.exec(name, stdio, process.args[0], bundle.encode(description), done)
        limit = rootfs.container_limit(rootfs.memory_bytes()["MemTotal"])
        config = bundle.config_json(description, self._mounts, self._readonly_root, limit)
        system.write_text(f"{rootfs.BUNDLE}/config.json", config)
        return container.run(stdio, process.args[0], done)
