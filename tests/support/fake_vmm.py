"""A fake of Firecracker and of Cloud Hypervisor, as programs: for hosts without KVM.

It takes only requests that the API description of its version allows, keeps the monitors' order of states, and serves
hybrid vsock by their rules. There is no guest: port 7 echoes, port 9 takes a line `PORT TEXT`, sends TEXT to that port
of the host and returns what the host answers, port 11 tells what the "guest's memory" holds, other ports are closed.
With FAKE_VMM_GUEST=real there is one: QEMU emulates the machine that was asked for, with a vsock device (which excludes
snapshots), so that all but the monitor's own process is the real thing.

Started as `fake_vmm.py KIND VERSION ARGUMENT...`, which `install` wraps into a program of the monitor's name.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import run_leftovers
from remora.guest.kernel import host_tsc_khz
from remora.vmm.firecracker_api import Version
from remora.vmm.process import set_death_signal
from vhost_vsock import VhostVsock
from vmm_api import ApiDescription, Refused, cloud_hypervisor, firecracker


def install(directory: Path, kind: str, version: str, *, guest: str = "") -> str:
    """Write a program that is this fake; returns its path.

    Args:
        kind: `firecracker` or `cloud-hypervisor`.
        guest: `real`: as FAKE_VMM_GUEST, for one whose environment is emptied.
    """
    program = directory / kind
    paths = os.pathsep.join(path for path in sys.path if path)
    real = f"FAKE_VMM_GUEST={guest} " if guest else ""
    program.write_text(
        "#!/bin/sh\n"
        f"{real}PYTHONPATH='{paths}' exec '{sys.executable}' '{Path(__file__).absolute()}' {kind} {version} \"$@\"\n"
    )
    program.chmod(0o755)
    return str(program)


class FakeVsock:
    """Hybrid vsock and what answers behind it."""

    def __init__(self, path: Path, memory: Callable[[], str]) -> None:
        self._path = path
        self._memory = memory
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._streams: set[socket.socket] = set()
        self._next = 1 << 30
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> None:
        """Close every stream, as a snapshot does."""
        for stream in list(self._streams):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.reset()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def announce(self) -> None:
        """The guest's first act: it connects to the accelerator's port, if somebody listens there already."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{self._path}_2048")
            sock.sendall(b"up\n")

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            self._streams.add(stream)
            threading.Thread(target=self._stream, args=(stream,), daemon=True).start()

    def _stream(self, stream: socket.socket) -> None:
        try:
            with stream:
                # The whole line must come in one piece: a split one is dropped (Firecracker's unix/muxer.rs).
                match = re.fullmatch(rb"CONNECT (\d+)\n", stream.recv(32))
                handler = {7: self._echo, 9: self._to_host, 11: self._tell_memory}.get(int(match[1]) if match else 0)
                if handler is None:
                    return
                self._next += 1
                stream.sendall(b"OK %d\n" % self._next)
                handler(stream)
        except OSError:
            pass
        finally:
            self._streams.discard(stream)

    def _echo(self, stream: socket.socket) -> None:
        while data := stream.recv(65536):
            stream.sendall(data)

    def _to_host(self, stream: socket.socket) -> None:
        port, _, text = stream.makefile("rb").readline().partition(b" ")
        with socket.socket(socket.AF_UNIX) as host:
            try:
                host.connect(f"{self._path}_{int(port)}")
            except OSError:
                stream.sendall(b"ECONNRESET\n")
                return
            host.sendall(text)
            host.shutdown(socket.SHUT_WR)
            while data := host.recv(65536):
                stream.sendall(data)

    def _tell_memory(self, stream: socket.socket) -> None:
        stream.sendall(self._memory().encode())


class RealGuest:
    """The machine that the monitor was told to be, emulated by QEMU and joined to hybrid sockets at `channel`."""

    def __init__(self, kernel: str, initrd: str, arguments: str, memory_mib: int, cpus: int, disks: list[str]) -> None:
        self._argv = ["qemu-system-x86_64", "-M", "microvm,memory-backend=ram,x-option-roms=off", "-cpu", "max"]
        self._argv += ["-accel", "tcg,thread=multi,tb-size=64", "-smp", str(cpus), "-m", str(memory_mib)]
        self._argv += ["-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"]
        self._argv += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]
        khz = host_tsc_khz(Path("/proc/cpuinfo").read_text())
        timing = f"tsc_early_khz={khz} tsc=reliable no_timer_check nokaslr mitigations=off"
        self._argv += ["-kernel", kernel, "-initrd", initrd, "-append", f"{arguments} {timing} reboot=t"]
        for number, disk in enumerate(disks):
            self._argv += ["-drive", f"id=d{number},file={disk},format=raw,if=none,readonly=on"]
            self._argv += ["-device", f"virtio-blk-device,drive=d{number}"]

    def start(self, channel: Path) -> None:
        # Not in the machine's own directory: its path may be as long as a socket's may be.
        folder = run_leftovers.directory("fakevmm")
        self._backend = VhostVsock(folder / "vhost", channel.absolute().parent, name=channel.name)
        argv = [
            *self._argv,
            "-chardev",
            f"socket,path={folder}/vhost,id=v",
            "-device",
            "vhost-user-vsock-device,chardev=v",
        ]
        parent = os.getpid()
        # Its stdin is the fake's, which reads nothing: in a jail there is no /dev/null.
        process = subprocess.Popen(argv, preexec_fn=lambda: set_death_signal(signal.SIGKILL, parent))
        threading.Thread(target=self._end_with, args=(process, folder), daemon=True).start()

    @staticmethod
    def _end_with(process: subprocess.Popen[bytes], folder: Path) -> None:
        status = process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(status)


class FakeVmm(ABC):
    """One process of a monitor. Relative paths are taken from its directory."""

    api: ApiDescription

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.vsock: FakeVsock | None = None
        #: Stands for the guest's memory: told by port 11, saved and restored.
        self.memory = ""

    def call(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        refused = self.api.check(method, path, body)
        if refused is None:
            with self.lock:
                try:
                    return self.act(method, path, body)
                except FakeError as error:
                    refused = error.refused
                except OSError as error:
                    refused = Refused(400, str(error))
        return refused.status, self.error(refused.message)

    @abstractmethod
    def act(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Do what an allowed request asks for; returns the status and the answer's JSON."""

    @abstractmethod
    def error(self, message: str) -> Any:
        """Return an error as this monitor words it."""

    def boot(self, vsock_path: str) -> None:
        if os.environ.get("FAKE_VMM_GUEST") == "real":
            self.guest().start(Path(vsock_path))
            return
        self.memory = f"{os.getpid()}"
        self.vsock = FakeVsock(Path(vsock_path), lambda: self.memory)
        print("fake guest: up", flush=True)
        self.vsock.announce()

    @abstractmethod
    def guest(self) -> RealGuest:
        """Return the machine that was configured."""

    def need_file(self, name: str) -> None:
        if not Path(name).is_file():
            raise FakeError(400, f"no such file: {name}")


class FakeError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.refused = Refused(status, message)


class FakeFirecracker(FakeVmm):
    def __init__(self, version: Version, name: str) -> None:
        super().__init__()
        self.version = version
        self.name = name
        self.api = firecracker(version)
        self.state = "Not started"
        self.config: dict[str, Any] = {"drives": {}, "network-interfaces": {}}

    def error(self, message: str) -> Any:
        return {"fault_message": message}

    def act(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        section, _, name = path.strip("/").partition("/")
        match method, section:
            case "GET", "":
                return 200, {
                    "app_name": "Firecracker",
                    "id": self.name,
                    "state": self.state,
                    "vmm_version": str(self.version),
                }
            case "PUT", "actions":
                return self._action(body["action_type"])
            case "PATCH", "vm":
                self._need("Running", "Paused")
                self.state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]
                return 204, None
            case "PUT", "snapshot":
                return self._create(body) if name == "create" else self._load(body)
            case "PATCH", "balloon":
                self._need("Running", "Paused")
                if "balloon" not in self.config:
                    raise FakeError(400, "no balloon device was configured")
                return 204, None
            case "PUT", "drives" | "network-interfaces":
                self._need("Not started")
                if section == "drives":
                    self.need_file(body["path_on_host"])
                if name != body.get("drive_id", body.get("iface_id")):
                    raise FakeError(400, "the id in the path is not the one in the body")
                self.config[section][name] = body
                return 204, None
            case "PUT", _:
                self._need("Not started")
                self.config[section] = body
                return 204, None
        raise FakeError(400, f"the fake does not know {method} {path}")

    def guest(self) -> RealGuest:
        boot, machine = self.config["boot-source"], self.config["machine-config"]
        return RealGuest(
            boot["kernel_image_path"],
            boot["initrd_path"],
            boot["boot_args"],
            machine["mem_size_mib"],
            machine["vcpu_count"],
            [drive["path_on_host"] for drive in self.config["drives"].values()],
        )

    def _need(self, *states: str) -> None:
        if self.state not in states:
            raise FakeError(400, f"the requested operation is not supported in state: {self.state}")

    def _action(self, action: str) -> tuple[int, Any]:
        if action == "InstanceStart":
            self._need("Not started")
            boot = self.config.get("boot-source")
            if boot is None:
                raise FakeError(400, "no boot source was configured")
            self.need_file(boot["kernel_image_path"])
            self.need_file(boot["initrd_path"])
            self.state = "Running"
            self.boot(self.config["vsock"]["uds_path"])
        elif action == "SendCtrlAltDel":
            self._need("Running")
            os._exit(0)
        return 204, None

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        self._need("Paused")
        # Streams end with the snapshot since 0.25; listeners stay.
        if self.vsock is not None:
            self.vsock.reset()
        Path(body["snapshot_path"]).write_text(json.dumps({"config": self.config, "version": str(self.version)}))
        Path(body["mem_file_path"]).write_text(self.memory)
        return 204, None

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        self._need("Not started")
        if "boot-source" in self.config:
            raise FakeError(400, "loading a snapshot is not allowed after configuring boot-specific resources")
        memory = body["mem_backend"]["backend_path"] if "mem_backend" in body else body["mem_file_path"]
        saved = json.loads(Path(body["snapshot_path"]).read_text())
        self.config = saved["config"]
        for drive in self.config["drives"].values():
            self.need_file(drive["path_on_host"])
        override = body.get("vsock_override", {}).get("uds_path")
        self.vsock = FakeVsock(Path(override or self.config["vsock"]["uds_path"]), lambda: self.memory)
        self.memory = Path(memory).read_text()
        self.state = "Running" if body.get("resume_vm") else "Paused"
        return 204, None


class FakeCloudHypervisor(FakeVmm):
    def __init__(self) -> None:
        super().__init__()
        self.api = cloud_hypervisor()
        self.state = ""
        self.config: dict[str, Any] = {}

    def error(self, message: str) -> Any:
        return ["Error from API", message]

    def act(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        name = path.removeprefix("/api/v1/")
        match name:
            case "vmm.ping":
                return 200, {"version": "v53.0", "build_version": "fake", "pid": os.getpid(), "features": []}
            case "vm.info":
                self._need("Created", "Running", "Paused", "Shutdown")
                return 200, {"config": self.config, "state": self.state}
            case "vm.create":
                self._need("")
                self.config, self.state = body, "Created"
            case "vm.boot":
                self._need("Created")
                self._boot_files()
                self.state = "Running"
                self.boot(self.config["vsock"]["socket"])
            case "vm.pause":
                self._need("Running")
                self.state = "Paused"
            case "vm.resume":
                self._need("Paused")
                self.state = "Running"
            case "vm.resize":
                self._need("Running")
            case "vm.snapshot":
                self._snapshot(Path(body["destination_url"].removeprefix("file://")))
            case "vm.restore":
                self._restore(Path(body["source_url"].removeprefix("file://")), resume=bool(body.get("resume")))
            case "vm.receive-migration":
                self._receive(body["receiver_url"].removeprefix("unix:"))
            case "vm.send-migration":
                self._send(body["destination_url"].removeprefix("unix:"), local=bool(body.get("local")))
            case _:
                raise FakeError(500, f"the fake does not know {name}")
        return 204, None

    def guest(self) -> RealGuest:
        payload = self.config["payload"]
        return RealGuest(
            payload["kernel"],
            payload["initramfs"],
            payload["cmdline"],
            self.config["memory"]["size"] >> 20,
            self.config["cpus"]["boot_vcpus"],
            [disk["path"] for disk in self.config["disks"]],
        )

    def _boot_files(self) -> None:
        for file in (self.config["payload"]["kernel"], self.config["payload"]["initramfs"]):
            self.need_file(file)
        for disk in self.config.get("disks", ()):
            self.need_file(disk["path"])

    def _need(self, *states: str) -> None:
        if self.state not in states:
            raise FakeError(404 if not self.state else 500, f"the VM is {self.state or 'not created'}")

    def _snapshot(self, directory: Path) -> None:
        self._need("Paused")
        if not directory.is_dir():
            raise FakeError(500, f"no such directory: {directory}")
        (directory / "config.json").write_text(json.dumps(self.config))
        (directory / "state.json").write_text("{}")
        (directory / "memory-ranges").write_text(self.memory)

    def _restore(self, directory: Path, *, resume: bool) -> None:
        self._need("")
        self.config = json.loads((directory / "config.json").read_text())
        json.loads((directory / "state.json").read_text())
        self._boot_files()
        self.memory = (directory / "memory-ranges").read_text()
        self.vsock = FakeVsock(Path(self.config["vsock"]["socket"]), lambda: self.memory)
        self.state = "Running" if resume else "Paused"

    def _receive(self, path: str) -> None:
        self._need("")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            peer, _ = listener.accept()
        os.unlink(path)
        with peer, peer.makefile("rb") as file:
            moved = json.loads(file.readline())
            self.config, self.memory = moved["config"], moved["memory"]
            # The sender gives its socket up before this one takes it over.
            peer.sendall(b"ready\n")
            file.readline()
            self.vsock = FakeVsock(Path(self.config["vsock"]["socket"]), lambda: self.memory)
            self.state = "Running"
            peer.sendall(b"done\n")

    def _send(self, path: str, *, local: bool) -> None:
        self._need("Running", "Paused")
        if local and not self.config.get("memory", {}).get("shared"):
            raise FakeError(500, "local migration needs shared memory")
        with socket.socket(socket.AF_UNIX) as peer, peer.makefile("rb") as file:
            peer.connect(path)
            peer.sendall(json.dumps({"config": self.config, "memory": self.memory}).encode() + b"\n")
            file.readline()
            if self.vsock is not None:
                self.vsock.close()
            peer.sendall(b"closed\n")
            file.readline()
        self.state, self.config = "", {}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, vmm: FakeVmm) -> None:
        self.vmm = vmm
        super().__init__(path, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(data) if data else None
        except ValueError as error:
            body, answer = None, (400, self.server.vmm.error(str(error)))
        else:
            answer = self.server.vmm.call(self.command, self.path, body)
        status, value = answer
        encoded = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        if encoded or status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        if encoded:
            self.wfile.write(encoded)

    do_GET = do_PUT = do_PATCH = _answer

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    kind, version, *arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print({"firecracker": "Firecracker v", "cloud-hypervisor": "cloud-hypervisor v"}[kind] + version)
        return
    vmm: FakeVmm
    if kind == "cloud-hypervisor":
        parser = argparse.ArgumentParser()
        parser.add_argument("--api-socket", required=True)
        parser.add_argument("--seccomp", choices=["true", "false", "log", "errno"])
        path = parser.parse_args(arguments).api_socket.removeprefix("path=")
        vmm = FakeCloudHypervisor()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--api-sock", default="/run/firecracker.socket")
        parser.add_argument("--id", default="anonymous-instance")
        for told_by_jailer in ("--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"):
            parser.add_argument(told_by_jailer, type=int)
        options = parser.parse_args(arguments)
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", options.id):
            parser.error(f"invalid id: {options.id}")
        vmm = FakeFirecracker(Version(*map(int, version.split("."))), options.id)
        path = options.api_sock
    if os.path.exists(path):
        sys.exit(f"cannot listen on {path}: it exists")
    with _Server(path, vmm) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
