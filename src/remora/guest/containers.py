"""All containers of the microVM by id, and all their processes by process id."""

from __future__ import annotations

from remora.errors import AlreadyExistsError, NotFoundError
from remora.guest import cgroup
from remora.guest.container import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List

    from remora.guest.children import Children
    from remora.guest.running import Running
    from remora.reactor import Reactor

#: The one container of a function (`remora run`).
MAIN = "main"


class Containers:
    def __init__(self, reactor: Reactor, children: Children, on_started: Callable[[Running], None]) -> None:
        self._reactor = reactor
        self._children = children
        self._on_started = on_started
        self._containers: Dict[str, Container] = {}

    def add(self, name: str, bundle: str) -> Container:
        if name in self._containers:
            raise AlreadyExistsError(f"a container {name!r} exists in this microVM")
        container = Container(self._reactor, self._children, name, bundle, self._on_started)
        self._containers[name] = container
        return container

    def remove(self, container: Container) -> None:
        container.close()
        self._containers.pop(container.name, None)

    def get(self, name: str) -> Container:
        container = self._containers.get(name)
        if container is None:
            known = ", ".join(sorted(self._containers)) or "none"
            raise NotFoundError(f"no container has the id {name!r}; known: {known}")
        return container

    def owner(self, process_id: str) -> Container:
        """Return the container of a process: `<container>`, `<container>/<exec>`, or an exec of MAIN by its own id."""
        name = process_id.partition("/")[0]
        return self._containers[name] if name in self._containers else self.get(MAIN)

    def find(self, process_id: str) -> Running:
        return self.owner(process_id).find(process_id)

    def running(self) -> List[Running]:
        """Return every process that is known, ended ones included."""
        return [running for container in self._containers.values() for running in container.all()]

    def kill_everything(self) -> None:
        for name in self._containers:
            cgroup.kill(name)
