"""Sandboxes as Kata lays them out, with real guests behind them: found, answered, and let go.

Neither Firecracker nor Cloud Hypervisor runs without KVM, so a fake of each makes the sockets and takes the commands;
the guest is emulated by QEMU and calls out over its own AF_VSOCK, as a container in a Kata sandbox does.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

import psutil
import pytest

import fake_jailer
import fake_vmm
from agent_process import AgentProcess, catalogue_directory, wait_until
from fleets import Node, connect, served
from remora import paths
from remora.guest.kernel import OS_DISK_SERIAL, kernel_arguments
from remora.images.guest_os import build_guest_image
from remora.images.store import ImageStore
from remora.vmm import firecracker_api as fc
from remora.vmm import jail as jails
from remora.vmm.api import ApiClient
from remora.vmm.cloud_hypervisor import put, vm_config
from remora.vmm.contract import Disk, VmSpec
from remora.wire import guest_v1 as v1
from remora.wire.ttrpc.sync import Client

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

#: Ten seconds on an idle machine.
BOOT_S = 120.0
#: As docs/kata.md has a container do it: the SDK, and one variable.
FUNCTION = """\
import base64, sys, remora
with remora.connect() as session:
    for line in sys.stdin:
        label = session.classify(base64.b64decode(line), top=1)[0]
        print(label.index, session.id, flush=True)
"""
#: The release that Kata 4.1 names.
FIRECRACKER = "1.12.1"


class Sandbox:
    """A microVM whose guest is spoken to through its hybrid socket."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, layers: list[str]) -> None:
        self.process = process
        self.path = path
        self._layers = layers

    def connect(self, port: int) -> socket.socket:
        """Open a stream to a port of the guest, as soon as it is up."""
        deadline_s = time.monotonic() + BOOT_S
        while True:
            assert self.process.poll() is None, "the monitor has ended"
            assert time.monotonic() < deadline_s, "the guest does not come up"
            sock = connect(self.path)
            try:
                sock.settimeout(2.0)  # the device of a guest that is not up yet may never answer
                sock.sendall(b"CONNECT %d\n" % port)
                if sock.recv(3) == b"OK ":
                    while sock.recv(1) != b"\n":
                        pass
                    sock.settimeout(BOOT_S)
                    return sock
            except OSError:
                pass
            sock.close()
            time.sleep(0.05)

    def run(self, code: str) -> tuple[socket.socket, IO[str]]:
        """Start a Python program in the guest's container; returns its stdin and stdout."""
        with Client(self.connect(v1.CONTROL_PORT)) as client:
            identity = v1.Identity(sandbox="x", hostname="x", time_ns=time.time_ns(), entropy=os.urandom(64))
            env = ["REMORA_ADDRESS=vsock://2:2048"]
            process = v1.Process(args=["sh", "-c", 'exec python3 -c "$0" 2>&1', code], env=env, stdin=True)
            for method, request in (
                ("Setup", v1.SetupRequest(identity=identity, layers=self._layers)),
                ("Start", v1.StartRequest(id="main", process=process)),
            ):
                client.call(v1.SERVICE, method, request, v1.METHODS[method][1], timeout_s=BOOT_S)
        streams = []
        for name in ("stdin", "stdout"):
            stream = self.connect(v1.STDIO_PORT)
            stream.sendall(f"main {name}\n".encode())
            streams.append(stream)
        with streams[1]:
            return streams[0], streams[1].makefile("r")


class Monitors:
    """Boots guests of an image under fakes of Kata's monitors. Everything ends with `close`."""

    def __init__(self, node: Node, image: str) -> None:
        self._node = node
        self._layers = list(ImageStore().get(image).layers)
        self._serials = [OS_DISK_SERIAL, *(f"l{number:02}" for number in range(len(self._layers)))]
        guest = build_guest_image(paths.state_dir())
        self._spec = VmSpec(
            kernel=guest.kernel,
            initrd=guest.initrd,
            arguments=kernel_arguments(None, vsock=True, disks=self._serials),
            memory_mib=256,
            cpus=1,
            accelerator="kvm",
            disks=tuple(
                Disk(serial, path) for serial, path in zip(self._serials, [guest.disk, *self._layers], strict=True)
            ),
        )
        self._running: list[subprocess.Popen[bytes]] = []
        self._apis: list[ApiClient] = []

    def firecracker(self, sandbox_id: str) -> Sandbox:
        """Boot a jailed Firecracker where Kata's Go runtime has it."""
        binary = Path(fake_vmm.install(self._node.root, "firecracker", FIRECRACKER, guest="real"))
        jailer = fake_jailer.install(self._node.root, FIRECRACKER)
        jail = jails.Jail(self._node.root / "run/vc", sandbox_id[:32], binary, uid=0, gid=0)
        path = self._node.path("go-firecracker", sandbox_id)
        assert path.parent == jail.root
        # The jailer wants its base made.
        jail.base.mkdir(parents=True, exist_ok=True)
        process = self._start(jails.command_line(jail, jailer))
        names = [f"d{number}" for number in range(len(self._spec.disks))]
        api = self._api(jail.root / jails.API_SOCKET, process)
        files = fc.Files(
            jails.place(jail, self._spec.kernel, "kernel"),
            jails.place(jail, self._spec.initrd, "initrd"),
            tuple(jails.place(jail, disk.path, name) for disk, name in zip(self._spec.disks, names, strict=True)),
            path.name,
        )
        for request in fc.boot_requests(self._spec, fc.parse_version(FIRECRACKER), files):
            api.send(request, timeout_s=BOOT_S)
        return Sandbox(process, path, self._serials)

    def cloud_hypervisor(self, sandbox_id: str) -> Sandbox:
        """Boot a Cloud Hypervisor where Kata's Rust runtime has it."""
        path = self._node.path("rust-cloud-hypervisor", sandbox_id)
        path.parent.mkdir(parents=True, mode=0o750)
        binary = fake_vmm.install(self._node.root, "cloud-hypervisor", "53.0")
        process = self._start((binary, "--api-socket", str(path.with_name("ch-api.sock"))))
        api = self._api(path.with_name("ch-api.sock"), process)
        api.send(put("vm.create", vm_config(self._spec, path)), timeout_s=BOOT_S)
        api.send(put("vm.boot"), timeout_s=BOOT_S)
        return Sandbox(process, path, self._serials)

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        env = {**os.environ, "FAKE_VMM_GUEST": "real"}
        process = subprocess.Popen(
            arguments, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._running.append(process)
        return process

    def _api(self, path: Path, process: subprocess.Popen[bytes]) -> ApiClient:
        """Connect; stays open, as the fake's guest dies with the thread that serves it."""
        api = ApiClient(path, "the monitor")
        self._apis.append(api)
        api.wait(BOOT_S, process.poll)
        return api

    def close(self) -> None:
        for api in self._apis:
            api.close()
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    # The fakes bind their sockets by name, which may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rk-") as name:
        yield Path(name)
        # QEMU dies with its monitor, a moment later.
        wait_until(lambda: not processes_of(Path(name)), "no process to be left")


def processes_of(folder: Path) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def test_real_guests_of_a_kata_node_classify_and_go(folder: Path, image: str, request: pytest.FixtureRequest) -> None:
    photographs = sorted((paths.state_dir() / "photos").glob("[0-9][0-9]_*.jpg"))[:2]
    if not photographs:
        pytest.skip("no photographs: make demo fetches them")
    node = Node(folder)
    (folder / "a").mkdir()
    agent = AgentProcess(folder / "a", config=node.config, models=catalogue_directory())
    agent.start("--attach", node.attach)
    request.addfinalizer(agent.kill)
    pods = {name: node.pod("prod", name) for name in ("fc", "clh")}
    names = {name: f"prod.{name}.{sandbox_id[:8]}" for name, sandbox_id in pods.items()}
    with closing(Monitors(node, image)) as monitors:
        sandboxes = {"fc": monitors.firecracker(pods["fc"]), "clh": monitors.cloud_hypervisor(pods["clh"])}
        wait_until(lambda: set(served(agent)) == set(names.values()), "both to be found")
        functions = {name: sandbox.run(FUNCTION) for name, sandbox in sandboxes.items()}
        sessions: dict[str, set[str]] = {name: set() for name in functions}
        for killed in (False, True):
            if killed:
                agent.kill()
                agent.start("--attach", node.attach)
            for name, (stdin, stdout) in functions.items():
                for photograph in photographs:
                    stdin.sendall(base64.b64encode(photograph.read_bytes()) + b"\n")
                    line = stdout.readline()
                    assert len(line.split()) == 2, line + stdout.read()
                    index, session = line.split()
                    assert int(index) == int(photograph.stem.split("_")[1])
                    sessions[name].add(session)
        assert [len(ids) for ids in sessions.values()] == [1, 1], "a session did not go on"
        assert sessions["fc"] != sessions["clh"]
        assert {one.sandbox: one.sessions for one in served(agent).values()} == dict.fromkeys(names.values(), 1)
        for stdin, stdout in functions.values():
            stdin.close()
            stdout.close()
        sandboxes["fc"].process.kill()
        node.remove(sandboxes["fc"].path.parents[1])
        wait_until(lambda: set(served(agent)) == {names["clh"]}, "the first to be let go")
    node.remove(sandboxes["clh"].path.parent)
    wait_until(lambda: not served(agent), "the second to be let go")
    assert agent.stop(signal.SIGTERM) == 0
    assert "internal error" not in agent.log
    assert list(folder.rglob("*_2048")) == []
    node.close()
