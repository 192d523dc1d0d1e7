"""Serves the kubelet's device plugin API for one resource, for as long as the node lives.

grpcio speaks for it (docs/decisions/0015): the other side is grpc-go, and a node has one such process. The messages are
our codec's. Whether shares are healthy is asked of the agent each `interval_s`, and so is whether our socket and the
kubelet's are still the ones that were registered: a kubelet that restarts removes all plugins' sockets.

A grant is stated to the agent before the kubelet hears of it, so an agent that is being restarted delays `Allocate`,
for which the kubelet waits; one that does not come back fails the pod's admission.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from remora.errors import RemoraError, UnavailableError
from remora.kube import device_plugin_v1beta1 as v1
from remora.kube.shares import Resource
from remora.wire import control_v1
from remora.wire.protobuf import Message

KUBELET_DIRECTORY = Path("/var/lib/kubelet/device-plugins")
KUBELET_SOCKET = "kubelet.sock"
_CALL_TIMEOUT_S = 5.0
#: How long an agent that is being restarted is waited for, and how often it is tried.
_AGENT_S = 20.0
_RETRY_S = 0.2
#: What a server that ends waits for; the kubelet notices a plugin that is gone.
_END_S = 5.0
_OPTIONS = v1.Options(get_preferred_allocation_available=True)
_STATUS = {
    3: grpc.StatusCode.INVALID_ARGUMENT,
    14: grpc.StatusCode.UNAVAILABLE,
}
#: A stream of ListAndWatch holds one thread; a kubelet that restarts may leave an old one behind for a while.
_THREADS = 8


class DevicePlugin:
    """`run` until `stop`; both from any thread.

    Args:
        healthy: Says whether the agent serves; may block for a second.
        state: Tells the agent of a grant; may block, and raise RemoraError.
    """

    def __init__(
        self,
        resource: Resource,
        directory: Path,
        healthy: Callable[[], bool],
        state: Callable[[control_v1.GrantRequest], None],
        *,
        interval_s: float = 0.5,
    ) -> None:
        self._resource = resource
        self._directory = directory
        self._ask = healthy
        self._state = state
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._healthy = False
        #: Counts our servers: a stream of an earlier one ends.
        self._epoch = 0
        self._server: grpc.Server | None = None
        self._registered: tuple[object, object] | None = None
        self._complaint = ""

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        try:
            while True:
                self._turn()
                if self._stopping.wait(self._interval_s):
                    return
        finally:
            self._end()

    def _turn(self) -> None:
        self._set(healthy=self._ask())
        kubelet = _mark(self._directory / KUBELET_SOCKET)
        if self._registered is not None and self._registered == (_mark(self._own), kubelet):
            return
        self._registered = None
        if kubelet is None:
            self._complain(f"no kubelet listens in {self._directory}; waiting for one")
            return
        try:
            if self._server is None or _mark(self._own) is None:
                self._end()
                self._serve()
            self._register()
        except (grpc.RpcError, RuntimeError, OSError) as error:
            code = getattr(error, "code", None)
            self._complain(
                f"the kubelet does not take {self._resource.name}: {code() if code else error}; trying again"
            )
            return
        self._registered = (_mark(self._own), kubelet)
        self._complain(f"{self._resource.name} is registered with the kubelet")

    @property
    def _own(self) -> Path:
        return self._directory / self._resource.endpoint

    def _serve(self) -> None:
        self._own.unlink(missing_ok=True)
        server = grpc.server(ThreadPoolExecutor(_THREADS, "kubelet"), options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(v1.DEVICE_PLUGIN, self._handlers()),))
        server.add_insecure_port(f"unix:{self._own}")
        server.start()
        os.chmod(self._own, 0o600)
        self._server = server

    def _register(self) -> None:
        request = v1.RegisterRequest(
            version=v1.VERSION,
            endpoint=self._resource.endpoint,
            resource_name=self._resource.name,
            options=_OPTIONS,
        )
        with grpc.insecure_channel(f"unix:{self._directory / KUBELET_SOCKET}") as channel:
            call = channel.unary_unary(f"/{v1.REGISTRATION}/Register", Message.to_bytes, v1.Empty.decode)
            call(request, timeout=_CALL_TIMEOUT_S)

    def _end(self) -> None:
        """End the server and its streams."""
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()
        server, self._server = self._server, None
        if server is not None:
            server.stop(1.0).wait(_END_S)
            self._own.unlink(missing_ok=True)

    def _set(self, *, healthy: bool) -> None:
        with self._changed:
            if healthy != self._healthy:
                self._healthy = healthy
                self._changed.notify_all()
                self._complain(f"shares are {v1.HEALTHY if healthy else v1.UNHEALTHY}")

    def _complain(self, text: str) -> None:
        """Say what is new, once."""
        if text != self._complaint:
            self._complaint = text
            print(f"remora node plugin: {text}", file=sys.stderr, flush=True)

    # -- what the kubelet calls -------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        def unary(method: Callable[..., Message], request: type[Message]) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(method, request.decode, Message.to_bytes)

        return {
            "GetDevicePluginOptions": unary(lambda _request, _context: _OPTIONS, v1.Empty),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._watch, v1.Empty.decode, Message.to_bytes),
            "GetPreferredAllocation": unary(self._prefer, v1.PreferredRequest),
            "Allocate": unary(self._allocate, v1.AllocateRequest),
        }

    def _watch(self, _request: v1.Empty, context: grpc.ServicerContext) -> Iterator[v1.ListAndWatchResponse]:
        epoch, told = self._epoch, None
        while context.is_active():
            with self._changed:
                if self._healthy == told and self._epoch == epoch:
                    self._changed.wait(1.0)
                if self._epoch != epoch:
                    return
                healthy = self._healthy
            if healthy != told:
                told = healthy
                yield self._resource.listed(healthy=healthy)

    def _prefer(self, request: v1.PreferredRequest, context: grpc.ServicerContext) -> v1.PreferredResponse:
        try:
            return self._resource.preferred(request)
        except RemoraError as error:
            _abort(context, error)
            raise

    def _allocate(self, request: v1.AllocateRequest, context: grpc.ServicerContext) -> v1.AllocateResponse:
        def state(grant: control_v1.GrantRequest) -> None:
            until_s = time.monotonic() + _AGENT_S
            while True:
                try:
                    self._state(grant)
                    return
                except UnavailableError:
                    if time.monotonic() > until_s or not context.is_active() or self._stopping.wait(_RETRY_S):
                        raise

        try:
            return self._resource.allocate(request, state)
        except RemoraError as error:
            self._complain(f"{self._resource.name} cannot be allocated: {error}")
            _abort(context, error)
            raise


def _abort(context: grpc.ServicerContext, error: RemoraError) -> None:
    context.abort(_STATUS.get(error.code, grpc.StatusCode.FAILED_PRECONDITION), str(error))


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from another one of its name; None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
