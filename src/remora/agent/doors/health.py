"""The standard health service: whether a new request would be served. On every door, for whoever can connect.

It says nothing of tenants, and costs no session: probes come every few seconds from those who hold none.
"""

from __future__ import annotations

from collections.abc import Iterable

from remora.agent.core import Core
from remora.errors import NotFoundError, UnimplementedError
from remora.wire import health_v1 as v1
from remora.wire.ttrpc.calls import Call

NAME = "health"


class Health:
    """Answers for `services`, and for the agent as a whole."""

    def __init__(self, core: Core, services: Iterable[str]) -> None:
        self._core = core
        self._services = ("", *services)

    def call(self, method: str, payload: bytes | memoryview) -> v1.CheckResponse:
        """Return the answer to a call of the service.

        Raises:
            UnimplementedError: for anything but Check; a watcher is told to ask again, as the specification allows.
            NotFoundError: no such service here.
        """
        if method != "Check":
            raise UnimplementedError(f"{v1.SERVICE} has no method {method[:100]!r} here", fix="call Check now and then")
        service = v1.CheckRequest.decode(payload).service
        if service not in self._services:
            raise NotFoundError(f"there is no service {service[:100]!r} here", fix=f"there is {self._listed()}")
        return v1.CheckResponse(status=v1.SERVING if self._core.ready()[0] else v1.NOT_SERVING)

    def handle(self, call: Call) -> None:
        """Answer a ttrpc call. A RemoraError raised here is answered by the connection."""
        call.respond(self.call(call.method, call.payload))

    def _listed(self) -> str:
        return ", ".join(name for name in self._services if name)
