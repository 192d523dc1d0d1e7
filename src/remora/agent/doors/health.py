"""The standard health service: whether a new request would be served. On every door, for whoever can connect.

It says nothing of tenants, and costs no session: probes come every few seconds from those who hold none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from remora.agent.core import Core
from remora.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from remora.wire import health_v1 as v1
from remora.wire.ttrpc.calls import Call

NAME = "health"
#: How often watchers' state is looked at.
_LOOK_S = 0.5
_MOST_REQUEST_BYTES = 1024


class Watcher(Protocol):
    """A call that is answered with each change, until its client ends it (`web.http2_streams.GrpcExchange`)."""

    @property
    def ended(self) -> bool: ...

    def tell(self, pieces: list[bytes | memoryview]) -> bool:
        """Send a message; False if the one before it has not been taken yet."""


class Health:
    """Answers for `services`, and for the agent as a whole."""

    def __init__(self, core: Core, services: Iterable[str]) -> None:
        self._core = core
        self._services = ("", *services)
        #: What each watcher was told last; services that are unknown stay so.
        self._watchers: dict[Watcher, int] = {}

    def call(self, method: str, payload: bytes | memoryview) -> v1.CheckResponse:
        """Return the answer to a call of the service.

        Raises:
            UnimplementedError: for anything but Check; over ttrpc watchers are told to ask again, as the specification
                allows.
            NotFoundError: no such service here.
        """
        if method != "Check":
            raise UnimplementedError(f"{v1.SERVICE} has no method {method[:100]!r} here", fix="call Check now and then")
        service = v1.CheckRequest.decode(payload).service
        if service not in self._services:
            raise NotFoundError(f"there is no service {service[:100]!r} here", fix=f"there is {self._listed()}")
        return v1.CheckResponse(status=self._status())

    def watch(self, watcher: Watcher, payload: bytes | memoryview) -> None:
        """Tell a caller how a service is, and again whenever that changes.

        Raises:
            InvalidArgumentError: the request is too large to be kept for so long.
        """
        if len(payload) > _MOST_REQUEST_BYTES:
            raise InvalidArgumentError(f"a request to watch has {_MOST_REQUEST_BYTES} bytes at most")
        known = v1.CheckRequest.decode(payload).service in self._services
        if not known:
            watcher.tell(v1.CheckResponse(status=v1.SERVICE_UNKNOWN).encode())
            return
        if not self._watchers:
            self._core.reactor.call_later(_LOOK_S, self._look)
        self._watchers[watcher] = -1
        self._tell()

    def _look(self) -> None:
        self._tell()
        if self._watchers:
            self._core.reactor.call_later(_LOOK_S, self._look)

    def _tell(self) -> None:
        status = self._status()
        for watcher, told in list(self._watchers.items()):
            if watcher.ended:
                del self._watchers[watcher]
            elif told != status and watcher.tell(v1.CheckResponse(status=status).encode()):
                self._watchers[watcher] = status

    def _status(self) -> int:
        return v1.SERVING if self._core.ready()[0] else v1.NOT_SERVING

    def handle(self, call: Call) -> None:
        """Answer a ttrpc call. A RemoraError raised here is answered by the connection."""
        call.respond(self.call(call.method, call.payload))

    def _listed(self) -> str:
        return ", ".join(name for name in self._services if name)
