"""A small client of Kubernetes' container runtime interface: pods and containers as a kubelet would make them."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc

import cri_v1 as cri
from remora.wire.protobuf import Message

_SERVICE = "/runtime.v1.RuntimeService"
CALL_TIMEOUT_S = 300.0
M = TypeVar("M", bound=Message)


class CriError(Exception):
    """containerd's refusal, in its words."""


class Cri:
    def __init__(self, address: Path, logs: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{address}")
        self.logs = logs

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, request: Message, answer: type[M], timeout_s: float = CALL_TIMEOUT_S) -> M:
        ask = self._channel.unary_unary(
            f"{_SERVICE}/{method}",
            request_serializer=lambda one: b"".join(one.encode()),
            response_deserializer=lambda data: answer.decode(data),
        )
        try:
            result: M = ask(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.details()}") from error
        return result

    def run_pod(
        self,
        name: str,
        *,
        namespace: str = "test",
        annotations: dict[str, str] | None = None,
        network: int = cri.POD,
        handler: str = "remora",
        cgroup_parent: str = "",
        dns: cri.Dns | None = None,
        sysctls: dict[str, str] | None = None,
        resources: cri.Resources | None = None,
    ) -> Pod:
        config = cri.SandboxConfig(
            metadata=cri.SandboxMetadata(name=name, uid=str(uuid.uuid4()), namespace=namespace),
            hostname=name if network == cri.POD else "",
            log_directory=str(self.logs),
            dns_config=dns,
            annotations=annotations or {},
            linux=cri.LinuxSandbox(
                cgroup_parent=cgroup_parent,
                sysctls=sysctls or {},
                resources=resources,
                security_context=cri.SandboxSecurity(
                    namespace_options=cri.NamespaceOption(network=network, pid=cri.CONTAINER)
                ),
            ),
        )
        request = cri.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return Pod(self, self.call("RunPodSandbox", request, cri.SandboxId).pod_sandbox_id, config)


class Pod:
    """A pod; `with` removes it at the end."""

    def __init__(self, client: Cri, sandbox: str, config: cri.SandboxConfig | None = None) -> None:
        self.cri = client
        self.id = sandbox
        self.config = config
        self._count = 0

    def __enter__(self) -> Pod:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        self.cri.call("StopPodSandbox", cri.SandboxId(pod_sandbox_id=self.id), cri.Empty)
        self.cri.call("RemovePodSandbox", cri.SandboxId(pod_sandbox_id=self.id), cri.Empty)

    @property
    def status(self) -> cri.SandboxStatus:
        answer = self.cri.call("PodSandboxStatus", cri.SandboxId(pod_sandbox_id=self.id), cri.SandboxStatusResponse)
        assert answer.status is not None
        return answer.status

    @property
    def ip(self) -> str:
        network = self.status.network
        return network.ip if network is not None else ""

    def create(
        self,
        *command: str,
        image: str = "localhost/remora/busybox:1",
        mounts: Sequence[cri.Mount] = (),
        env: dict[str, str] | None = None,
        security: cri.ContainerSecurity | None = None,
        resources: cri.Resources | None = None,
        **config: Any,
    ) -> Container:
        self._count += 1
        name = f"c{self._count}"
        security = security or cri.ContainerSecurity()
        # As a kubelet has it: a PID namespace of its own unless the pod shares one.
        security.namespace_options = security.namespace_options or cri.NamespaceOption(pid=cri.CONTAINER)
        request = cri.CreateContainerRequest(
            pod_sandbox_id=self.id,
            sandbox_config=self.config,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=name, attempt=0),
                image=cri.ImageSpec(image=image),
                command=list(command),
                envs=[cri.KeyValue(key=key, value=value) for key, value in (env or {}).items()],
                mounts=list(mounts),
                log_path=f"{self.id[:12]}-{name}.log",
                linux=cri.LinuxContainer(resources=resources, security_context=security),
                **config,
            ),
        )
        answer = self.cri.call("CreateContainer", request, cri.ContainerId)
        return Container(self, answer.container_id, self.cri.logs / f"{self.id[:12]}-{name}.log")

    def start(self, *command: str, **config: Any) -> Container:
        container = self.create(*command, **config)
        container.start()
        return container

    def forward(self, port: int) -> WebSocket:
        """Return a connection to a port of the pod, as `kubectl port-forward` makes one; messages are of channel 0."""
        request = cri.PortForwardRequest(pod_sandbox_id=self.id, port=[port])
        url = self.cri.call("PortForward", request, cri.UrlResponse).url
        return WebSocket(f"{url}?port={port}")

    @property
    def stats(self) -> cri.LinuxSandboxStats:
        answer = self.cri.call("PodSandboxStats", cri.SandboxId(pod_sandbox_id=self.id), cri.SandboxStatsResponse)
        assert answer.stats is not None
        assert answer.stats.linux is not None
        return answer.stats.linux


class Container:
    def __init__(self, pod: Pod, container: str, log: Path) -> None:
        self.pod = pod
        self.cri = pod.cri
        self.id = container
        self.log = log

    def start(self) -> None:
        self.cri.call("StartContainer", cri.ContainerId(container_id=self.id), cri.Empty)

    def stop(self, timeout_s: int = 5) -> None:
        self.cri.call("StopContainer", cri.StopContainerRequest(container_id=self.id, timeout=timeout_s), cri.Empty)

    def remove(self) -> None:
        self.cri.call("RemoveContainer", cri.ContainerId(container_id=self.id), cri.Empty)

    @property
    def status(self) -> cri.ContainerStatus:
        request = cri.ContainerId(container_id=self.id)
        answer = self.cri.call("ContainerStatus", request, cri.ContainerStatusResponse)
        assert answer.status is not None
        return answer.status

    def wait(self, timeout_s: float = 60.0) -> cri.ContainerStatus:
        """Return the status once the container has ended."""
        deadline_s = time.monotonic() + timeout_s
        while (status := self.status).state != cri.EXITED:
            assert time.monotonic() < deadline_s, f"the container did not end within {timeout_s} s"
            time.sleep(0.05)
        return status

    def output(self) -> str:
        """Return what the container has written to both streams, in containerd's log."""
        if not self.log.exists():
            return ""
        text = ""
        for line in self.log.read_text().splitlines():
            _, _, tag, content = [*line.split(" ", 3), ""][:4]
            text += content + ("\n" if tag == "F" else "")
        return text

    def exec(self, *command: str, timeout_s: int = 60) -> cri.ExecSyncResponse:
        request = cri.ExecSyncRequest(container_id=self.id, cmd=list(command), timeout=timeout_s)
        return self.cri.call("ExecSync", request, cri.ExecSyncResponse)

    def sh(self, script: str) -> str:
        answer = self.exec("sh", "-c", script)
        assert answer.exit_code == 0, (script, answer.exit_code, answer.stdout, answer.stderr)
        return bytes(answer.stdout).decode()

    def exec_stream(self, *command: str, tty: bool = False, stdin: bool = True) -> WebSocket:
        request = cri.ExecRequest(
            container_id=self.id, cmd=list(command), tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        return WebSocket(self.cri.call("Exec", request, cri.UrlResponse).url)

    def attach(self, *, tty: bool = False) -> WebSocket:
        request = cri.AttachRequest(container_id=self.id, stdin=True, tty=tty, stdout=True, stderr=not tty)
        return WebSocket(self.cri.call("Attach", request, cri.UrlResponse).url)

    def update(self, resources: cri.Resources) -> None:
        self.cri.call("UpdateContainerResources", cri.UpdateRequest(container_id=self.id, linux=resources), cri.Empty)

    @property
    def stats(self) -> cri.ContainerStats:
        request = cri.ContainerId(container_id=self.id)
        answer = self.cri.call("ContainerStats", request, cri.ContainerStatsResponse)
        assert answer.stats is not None
        return answer.stats


class WebSocket:
    """A streaming connection of the kubelet's protocol v4.channel.k8s.io: each message has its channel as first byte.

    Channels: 0 stdin, 1 stdout, 2 stderr, 3 the final status as JSON, 4 terminal size.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._sock = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        self._sock.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n".encode()
        )
        self._file = self._sock.makefile("rb")
        status = self._file.readline()
        assert b" 101 " in status, status
        while self._file.readline().strip():
            pass

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def send(self, data: bytes, channel: int = 0) -> None:
        payload = bytes([channel]) + data
        size = len(payload)
        head = struct.pack("!BBH", 0x82, 0xFE, size) if size < 1 << 16 else struct.pack("!BBQ", 0x82, 0xFF, size)
        # A mask of zeros is a mask.
        self._sock.sendall(head + bytes(4) + payload)

    def resize(self, columns: int, rows: int) -> None:
        self.send(json.dumps({"Width": columns, "Height": rows}).encode(), 4)

    def receive(self) -> tuple[int, bytes] | None:
        """Return (channel, data) of the next message that is not empty; None at the end."""
        while True:
            head = self._file.read(2)
            if len(head) < 2 or head[0] & 0x0F == 8:
                return None
            size = head[1] & 0x7F
            if size == 126:
                size = struct.unpack("!H", self._file.read(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._file.read(8))[0]
            data = self._file.read(size)
            if head[0] & 0x0F in (1, 2) and len(data) > 1:
                return data[0], data[1:]

    def read_until(self, wanted: bytes, channel: int = 1) -> bytes:
        """Return what came on a channel up to and with `wanted`."""
        got = b""
        while wanted not in got:
            message = self.receive()
            assert message is not None, f"the stream ended; it said {got!r}"
            if message[0] == channel:
                got += message[1]
        return got

    def read_to_end(self) -> tuple[bytes, bytes, dict[str, Any]]:
        """Return stdout, stderr and the final status."""
        out, err, status = b"", b"", b""
        while (message := self.receive()) is not None:
            if message[0] == 1:
                out += message[1]
            elif message[0] == 2:
                err += message[1]
            elif message[0] == 3:
                status += message[1]
        return out, err, json.loads(status) if status else {}
