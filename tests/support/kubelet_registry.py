"""The kubelet's side of the device plugin API: takes registrations, watches devices, allocates."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from remora.kube import device_plugin_v1beta1 as v1
from remora.wire.protobuf import Message


class Kubelet:
    """One life of a kubelet: removes all sockets of its directory at the start, as the real one does."""

    def __init__(self, directory: Path) -> None:
        self.registrations: queue.Queue[v1.RegisterRequest] = queue.Queue()
        self._directory = directory
        for path in directory.glob("*.sock"):
            path.unlink()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_unary_rpc_method_handler(self._register, v1.RegisterRequest.decode, Message.to_bytes)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(v1.REGISTRATION, {"Register": handler}),)
        )
        self._server.add_insecure_port(f"unix:{directory}/kubelet.sock")
        self._server.start()
        self._channels: list[Any] = []

    def _register(self, request: v1.RegisterRequest, _context: object) -> v1.Empty:
        self.registrations.put(request)
        return v1.Empty()

    def channel(self, endpoint: str) -> Any:
        channel = grpc.insecure_channel(f"unix:{self._directory / endpoint}")
        self._channels.append(channel)
        return channel

    def watch(self, endpoint: str) -> Any:
        """Return the stream of ListAndWatch."""
        method = f"/{v1.DEVICE_PLUGIN}/ListAndWatch"
        call = self.channel(endpoint).unary_stream(method, Message.to_bytes, v1.ListAndWatchResponse.decode)
        return call(v1.Empty(), timeout=20)

    def options(self, endpoint: str) -> v1.Options:
        method = f"/{v1.DEVICE_PLUGIN}/GetDevicePluginOptions"
        call = self.channel(endpoint).unary_unary(method, Message.to_bytes, v1.Options.decode)
        answer: v1.Options = call(v1.Empty(), timeout=5)
        return answer

    def prefer(self, endpoint: str, available: list[str], size: int, must: list[str] | None = None) -> list[str]:
        """Ask for one container, as the kubelet does before it allocates."""
        method = f"/{v1.DEVICE_PLUGIN}/GetPreferredAllocation"
        call = self.channel(endpoint).unary_unary(method, Message.to_bytes, v1.PreferredResponse.decode)
        one = v1.ContainerPreferredRequest(available=available, must_include=must or [], size=size)
        answer: v1.PreferredResponse = call(v1.PreferredRequest(container_requests=[one]), timeout=5)
        return list(answer.container_responses[0].device_ids)

    def allocate(self, endpoint: str, *containers: list[str]) -> v1.AllocateResponse:
        method = f"/{v1.DEVICE_PLUGIN}/Allocate"
        call = self.channel(endpoint).unary_unary(method, Message.to_bytes, v1.AllocateResponse.decode)
        requests = [v1.ContainerAllocateRequest(devices_ids=ids) for ids in containers]
        answer: v1.AllocateResponse = call(v1.AllocateRequest(container_requests=requests), timeout=5)
        return answer

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._server.stop(0).wait()
