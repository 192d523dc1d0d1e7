"""Others' microVMs as they lie on a node: Kata's directories and sockets, containerd's bundles, a monitor's sockets.

The process that uses this is the monitor of all of them: it listens on their sockets and calls beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from agent_process import AgentProcess
from remora.wire import control_v1

CRI = "io.kubernetes.cri."


def at(path: Path) -> tuple[str, int]:
    """Return a name by which a socket of any length of path can be bound or connected to, and what to close after."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    return f"/proc/self/fd/{directory}/{path.name}", directory


def connect(path: Path, patience_s: float = 2.0) -> socket.socket:
    """Connect; a socket has its file a moment before somebody listens on it."""
    name, directory = at(path)
    deadline_s = time.monotonic() + patience_s
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10.0)
            try:
                sock.connect(name)
                return sock
            except ConnectionRefusedError:
                sock.close()
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
            except BaseException:
                sock.close()
                raise
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    name, directory = at(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(name)
    sock.listen(16)
    os.close(directory)
    return sock


class Node:
    """A node below a directory of its own. `attach` and `config` are what the agent is told of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.containerd = root / "run/containerd"
        self.containerd.mkdir(parents=True)
        self.attach = f"kata:{root}"
        self.config = f'[fleets]\ncontainerd = "{self.containerd}"\n'
        self._open: list[socket.socket] = []

    def bundle(
        self,
        sandbox_id: str,
        annotations: Mapping[str, str],
        *,
        container: str = "sandbox",
        namespace: str = "k8s.io",
    ) -> Path:
        path = self.containerd / "io.containerd.runtime.v2.task" / namespace / sandbox_id / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"ociVersion": "1.1.0", "annotations": dict(annotations)}))
        return path

    def pod(self, namespace: str, name: str, **more: str) -> str:
        """Write the bundle of a pod's sandbox, as containerd does; returns its id."""
        sandbox_id = uuid.uuid4().hex * 2
        self.bundle(sandbox_id, {**more, **cri(sandbox_id, namespace, name)})
        return sandbox_id

    def path(self, kind: str, sandbox_id: str) -> Path:
        """Return where one of Kata's monitors has its hybrid socket."""
        return (
            self.root
            / {
                "go-firecracker": f"run/vc/firecracker/{sandbox_id[:32]}/root/kata.hvsock",
                "go-cloud-hypervisor": f"run/vc/vm/{sandbox_id}/clh.sock",
                "rust-firecracker": f"run/kata/{sandbox_id}/kata.hvsock",
                "rust-jailed-firecracker": f"run/kata/firecracker/{sandbox_id}/root/kata.hvsock",
                "rust-cloud-hypervisor": f"run/kata/{sandbox_id}/ch-vm.sock",
                "dragonball": f"run/kata/{sandbox_id}/root/kata.hvsock",
                "openvmm": f"run/kata/{sandbox_id}/vsock.sock",
            }[kind]
        )

    def boot(self, path: Path) -> Path:
        """Be the monitor that listens there; returns where its guest's calls to the agent go."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._open.append(listen(path))
        return path.with_name(f"{path.name}_2048")

    def shim(self, parent: str, sandbox_id: str, answer: Callable[[], bytes]) -> None:
        """Be a shim: serve its management socket."""
        directory = self.root / parent / sandbox_id
        directory.mkdir(parents=True, exist_ok=True)
        listener = listen(directory / "shim-monitor.sock")
        self._open.append(listener)

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock, suppress(OSError):
                    assert sock.recv(1024).startswith(b"GET /agent-url HTTP/1.")
                    sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer())

        threading.Thread(target=serve, daemon=True).start()

    def remove(self, path: Path) -> None:
        """Do what Kata does at the end of a sandbox."""
        shutil.rmtree(path)

    def clear(self) -> None:
        """Have every sandbox of Kata's gone, and its pod."""
        self.close()
        for path in (self.root / "run/vc", self.root / "run/kata", self.containerd / "io.containerd.runtime.v2.task"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
            sock.close()
        self._open.clear()


def cri(sandbox_id: str, namespace: str, name: str) -> dict[str, str]:
    return {
        f"{CRI}container-type": "sandbox",
        f"{CRI}sandbox-id": sandbox_id,
        f"{CRI}sandbox-namespace": namespace,
        f"{CRI}sandbox-name": name,
        f"{CRI}sandbox-uid": f"uid-of-{name}",
    }


def served(agent: AgentProcess) -> dict[str, control_v1.Attachment]:
    """Return what the agent serves, by name."""
    listed = agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse).attachments
    return {one.sandbox: one for one in listed}
