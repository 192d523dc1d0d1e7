"""Cloud Hypervisor: one process per microVM, told over its REST API what to be.

The guest's channel is its hybrid vsock, by Firecracker's rules (docs/vsock.md); restored guests are told that their
streams are gone since v52, so older releases make no templates. Snapshots are its own files (config, state, memory
ranges); here the first two become one `state` file and the memory goes where every driver keeps it, so that a template
looks alike whoever saved it.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from remora.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from remora.vmm.api import Request
from remora.vmm.api_machine import CALL_S, ApiMachine, limiter, spawn_with_console
from remora.vmm.channel import SOCKET_NAME
from remora.vmm.contract import Capabilities, Driver, Machine, Network, Rate, VmSpec
from remora.vmm.process import find_program, version_of

BINARY = "cloud-hypervisor"
#: The guest's address on its vsock; private to each monitor.
GUEST_CID = 3
#: Restored guests learn that their streams are gone (its pull request 7958).
OLDEST_RESTORE = 52
_PREFIX = "/api/v1/"
_API_SOCKET = "cloud-hypervisor.sock"
_SNAPSHOT_FILES = ("config.json", "state.json")
_MEMORY_FILE = "memory-ranges"
_CAPABILITIES = Capabilities(
    snapshot=True, clone=True, live_migration=True, hot_plug=True, emulation=False, channel="vsock", max_disks=24
)


def put(name: str, body: dict[str, Any] | None = None) -> Request:
    """Return a call that changes something: all of them are PUT."""
    return Request("PUT", _PREFIX + name, body)


def check(spec: VmSpec) -> None:
    """Refuse what Cloud Hypervisor cannot hold.

    Raises:
        InvalidArgumentError, FailedPreconditionError: with the bound that is broken.
    """
    if not 1 <= spec.cpus <= 254:
        raise InvalidArgumentError(f"{spec.cpus} CPUs were asked for", fix="a microVM has 1 to 254")
    if spec.accelerator != "kvm":
        raise FailedPreconditionError(
            "Cloud Hypervisor needs KVM, and no guest boots with it on this host",
            fix="use QEMU, which can emulate: --vmm qemu (`remora doctor` says more)",
        )


def vm_config(spec: VmSpec, channel: Path) -> dict[str, Any]:
    """Return the machine as a `VmConfig`.

    Memory is private to the process; only a source of local migration needs it shared.
    """
    check(spec)
    config: dict[str, Any] = {
        "payload": {"kernel": str(spec.kernel), "initramfs": str(spec.initrd), "cmdline": spec.arguments},
        "cpus": {"boot_vcpus": spec.cpus, "max_vcpus": spec.cpus},
        "memory": {"size": spec.memory_mib << 20},
        "disks": [
            {
                "id": f"d{number}",
                "path": str(disk.path),
                "readonly": disk.readonly,
                "serial": disk.serial,
                "image_type": "Raw",
                **limiter("rate_limiter_config", disk.rate),
            }
            for number, disk in enumerate(spec.disks)
        ],
        "vsock": {"cid": GUEST_CID, "socket": str(channel)},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "rng": {"src": "/dev/urandom"},
    }
    if spec.networks:
        config["net"] = [_interface(network, number) for number, network in enumerate(spec.networks)]
    if spec.reclaim:
        config["balloon"] = {"size": 0, "deflate_on_oom": True, "free_page_reporting": True}
    return config


def _interface(network: Network, number: int) -> dict[str, Any]:
    # One limiter serves both directions here: the narrower of the two is what was promised.
    return {
        "id": f"n{number}",
        "tap": network.tap,
        "mac": network.mac,
        "mtu": network.mtu,
        **limiter("rate_limiter_config", _narrower(network.receive, network.send)),
    }


def _narrower(one: Rate, other: Rate) -> Rate:
    """Return the lower bound of each kind; 0 is none."""
    return Rate(*(min(a, b) if a and b else a or b for a, b in zip(one, other, strict=True)))


def for_clone(config: dict[str, Any], spec: VmSpec, channel: Path) -> dict[str, Any]:
    """Return a saved machine's configuration with what a clone has of its own: its channel and its taps."""
    own = {**config, "vsock": {**(config.get("vsock") or {}), "socket": str(channel)}}
    if spec.networks:
        saved = config.get("net") or []
        if len(saved) != len(spec.networks):
            raise InvalidArgumentError(f"the template has {len(saved)} networks and the clone {len(spec.networks)}")
        own["net"] = [{**net, "tap": mine.tap} for net, mine in zip(saved, spec.networks, strict=True)]
    return own


class CloudHypervisorMachine(ApiMachine):
    """One Cloud Hypervisor process. Not thread-safe, except that `kill` and `reap` may come from another thread."""

    def __init__(
        self, pid: int, console: socket.socket, *, api_path: Path, spec: VmSpec, release: int, directory: Path
    ) -> None:
        super().__init__(pid, console, api_path=api_path, monitor="Cloud Hypervisor", spec=spec)
        self._release = release
        self._directory = directory

    @property
    def channel_directory(self) -> Path:
        return self._directory

    def connect(self, timeout_s: float) -> None:
        self._api.wait(timeout_s, self.reap)
        if not self._spec.incoming:
            self._api.send(put("vm.create", vm_config(self._spec, self._directory / SOCKET_NAME)), timeout_s=CALL_S)
            self._api.send(put("vm.boot"), timeout_s=CALL_S)

    def pause(self) -> None:
        self._api.send(put("vm.pause"))

    def resume(self) -> None:
        self._api.send(put("vm.resume"))

    def save(self, state: Path, timeout_s: float) -> None:
        memory = self._new_state(state)
        self._check_restore()
        draft = state.with_name(f".{state.name}.snapshot")
        draft.mkdir(mode=0o700)
        try:
            self._api.send(put("vm.pause"), timeout_s=timeout_s)
            self._api.send(put("vm.snapshot", {"destination_url": f"file://{draft}"}), timeout_s=timeout_s)
            parts = {name: json.loads((draft / name).read_text()) for name in _SNAPSHOT_FILES}
            _write(state, json.dumps(parts).encode())
            (draft / _MEMORY_FILE).replace(memory)
        finally:
            for entry in draft.iterdir():
                entry.unlink()
            draft.rmdir()

    def restore(self, state: Path, timeout_s: float) -> None:
        memory = self._memory_file()
        self._check_restore()
        try:
            parts = json.loads(state.read_text())
            config, saved = (parts[name] for name in _SNAPSHOT_FILES)
        except (ValueError, KeyError, TypeError) as error:
            raise DataLossError(f"{state} holds no state of Cloud Hypervisor", fix="make the template again") from error
        own = self._directory / "restored"
        own.mkdir(mode=0o700)
        config = for_clone(config, self._spec, self._directory / SOCKET_NAME)
        for name, value in zip(_SNAPSHOT_FILES, (config, saved), strict=True):
            _write(own / name, json.dumps(value).encode())
        (own / _MEMORY_FILE).symlink_to(memory)
        # OnDemand: pages come as the guest touches them, by userfaultfd; the file is only read.
        body = {"source_url": f"file://{own}", "memory_restore_mode": "OnDemand", "resume": True}
        self._api.send(put("vm.restore", body), timeout_s=timeout_s)

    def take_memory(self, amount_mib: int) -> None:
        """Have the guest's balloon hold `amount_mib`; needs `reclaim`."""
        self._api.send(put("vm.resize", {"desired_balloon": amount_mib << 20}))

    def receive_migration(self, url: str, timeout_s: float) -> None:
        """Wait for a machine that another process sends (`unix:PATH` or `tcp:HOST:PORT`); made with `incoming`."""
        self._api.send(put("vm.receive-migration", {"receiver_url": url}), timeout_s=timeout_s)

    def send_migration(self, url: str, timeout_s: float, *, local: bool = False) -> None:
        """Send this machine to a process that waits at `url`; `local` hands its memory over without a copy.

        Since v53 the call returns at once and the end shows in the machine's state; before, it returns at the end.
        """
        body: dict[str, Any] = {"destination_url": url}
        if local:
            body["local"] = True
        self._api.send(put("vm.send-migration", body), timeout_s=timeout_s)

    def _check_restore(self) -> None:
        if self._release < OLDEST_RESTORE:
            raise FailedPreconditionError(
                f"microVMs that Cloud Hypervisor {self._release} restores can lose their channel",
                fix=f"install v{OLDEST_RESTORE} or newer",
            )


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


class CloudHypervisorDriver:
    """Starts microVMs with the Cloud Hypervisor that is installed."""

    name = "cloud-hypervisor"
    capabilities = _CAPABILITIES

    def __init__(self, binary: str | None = None) -> None:
        found = binary or find_program(BINARY)
        if found is None:
            raise FailedPreconditionError(
                "cloud-hypervisor is not installed",
                fix="put a release of Cloud Hypervisor on PATH, or use QEMU: --vmm qemu",
            )
        self.binary = found
        self._version = ""

    @property
    def version(self) -> str:
        if not self._version:
            self._version = version_of(self.binary, r"v(\d+\.\d+(?:\.\d+)?)", "Cloud Hypervisor")
        return self._version

    def check(self, spec: VmSpec) -> None:
        check(spec)

    def start(
        self, spec: VmSpec, *, directory: Path, channel_fd: int | None = None, keep_fds: tuple[int, ...] = ()
    ) -> CloudHypervisorMachine:
        if channel_fd is not None:
            raise InvalidArgumentError("Cloud Hypervisor serves the guest's channel itself and takes no socket for it")
        check(spec)
        release = int(self.version.partition(".")[0])
        for stale in (_API_SOCKET, SOCKET_NAME):
            (directory / stale).unlink(missing_ok=True)
        arguments = (self.binary, "--api-socket", f"path={_API_SOCKET}", "--seccomp", "true")
        pid, console = spawn_with_console(arguments, keep_fds=keep_fds, directory=directory)
        return CloudHypervisorMachine(
            pid, console, api_path=directory / _API_SOCKET, spec=spec, release=release, directory=directory
        )


def _conforms(machine: CloudHypervisorMachine, driver: CloudHypervisorDriver) -> tuple[Machine, Driver]:
    """mypy proves here that the classes fulfil the contract."""
    return machine, driver
