"""QEMU's `microvm` machine: the driver that works everywhere, with KVM or by emulation.

`command_line` is pure: golden tests read it. The process gets three connected sockets as inherited descriptors (QMP,
console, channel), so there is no socket file to wait for, to race for, or to leave behind. It may neither start
programs nor gain privileges (`-sandbox`, which is why saved states go through `fd:` and not `exec:`), has no network
device, and dies with the thread that started it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from remora.errors import DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from remora.guest.kernel import CHANNEL_PORT_NAME, MAX_SERIAL_BYTES
from remora.vmm.contract import Capabilities, Driver, Rate, SlottedMachine, VmSpec
from remora.vmm.process import MonitorProcess, find_program, spawn, version_of
from remora.vmm.qmp import QmpClient

BINARY = "qemu-system-x86_64"
#: virtio-mmio has 24 slots with ACPI; the serial bus takes one, the rest is left free.
MAX_DISKS = 20
MAX_DEVICES = 23
#: What the guest sees as the size of a slot; a read-only disk could not tell it of a change.
SLOT_BYTES = 1 << 40
#: Smallest memory with which the guest OS image boots (measured; docs/running.md).
MIN_MEMORY_MIB = 80
#: MiB that translated code may take: without it one emulated guest grows by several hundred MiB.
TRANSLATION_CACHE_MIB = 64
_CAPABILITIES = Capabilities(
    snapshot=True,
    clone=True,
    live_migration=True,
    hot_plug=False,
    emulation=True,
    channel="stream",
    max_disks=MAX_DISKS,
)
_IGNORE_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


def check(spec: VmSpec) -> None:
    """Refuse what this machine type cannot hold.

    Raises:
        InvalidArgumentError: with the bound that is broken.
    """
    if spec.memory_mib < MIN_MEMORY_MIB:
        raise InvalidArgumentError(
            f"{spec.memory_mib} MiB of memory is too small for a microVM", fix=f"ask for {MIN_MEMORY_MIB}M or more"
        )
    if not 1 <= spec.cpus <= 64:
        raise InvalidArgumentError(f"{spec.cpus} CPUs were asked for", fix="a microVM has 1 to 64")
    if len(spec.disks) > MAX_DISKS:
        raise InvalidArgumentError(
            f"the image and its mounts need {len(spec.disks)} disks and a microVM takes {MAX_DISKS}",
            fix="build the image with fewer layers",
        )
    devices = len(spec.disks) + len(spec.slots) + len(spec.networks) + spec.reclaim
    if devices > MAX_DEVICES:
        raise InvalidArgumentError(f"{devices} disks and network cards were asked for; a microVM takes {MAX_DEVICES}")
    if spec.reclaim and spec.ram_file is not None:
        raise InvalidArgumentError("a template's memory is a file, from which nothing can be given back")
    if any(network.receive != Rate() or network.send != Rate() for network in spec.networks):
        raise InvalidArgumentError("QEMU does not bound a network's rate", fix="have CNI's bandwidth plugin do it")
    for serial in (*(disk.serial for disk in spec.disks), *(slot.serial for slot in spec.slots)):
        if len(serial) > MAX_SERIAL_BYTES:
            raise InvalidArgumentError(f"the disk serial '{serial}' has more than {MAX_SERIAL_BYTES} characters")


def command_line(
    spec: VmSpec, *, binary: str = BINARY, qmp_fd: int, console_fd: int, channel_fd: int
) -> tuple[str, ...]:
    """Return the argument vector for `spec`; the descriptors are those that the process inherits."""
    check(spec)
    memory = f"{spec.memory_mib}M"
    # No option ROMs: nothing boots from a network or a disk. With ACPI, because Debian's kernel finds its virtio-mmio
    # devices in no other way.
    machine = "microvm,x-option-roms=off"
    if spec.accelerator == "tcg":
        accelerator = ["-accel", f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}", "-cpu", "max"]
    else:
        machine += ",rtc=off"
        accelerator = ["-accel", "kvm", "-cpu", "host"]
    memory_object: list[str] = []
    if spec.ram_file is not None:
        machine += ",memory-backend=ram"
        share = "off" if spec.ram_private else "on"
        memory_object = [
            "-object",
            f"memory-backend-file,id=ram,size={memory},mem-path={_quote(str(spec.ram_file))},share={share}",
        ]
    arguments = [
        binary,
        *("-machine", machine),
        *accelerator,
        *("-smp", str(spec.cpus)),
        *("-m", memory),
        *memory_object,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initrd)),
        *("-append", spec.arguments),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-chardev", f"socket,id=channel,fd={channel_fd}"),
        *("-device", f"virtserialport,chardev=channel,name={CHANNEL_PORT_NAME}"),
    ]
    for number, disk in enumerate(spec.disks):
        drive = f"id=d{number},file={_quote(str(disk.path))},format=raw,if=none,"
        # A writable disk does not outlive its machine: nothing has to reach the platter.
        drive += "readonly=on" if disk.readonly else "readonly=off,cache=unsafe,discard=unmap"
        arguments += ["-drive", drive, "-device", f"virtio-blk-device,drive=d{number},serial={disk.serial}"]
    for slot in spec.slots:
        node = {"driver": "raw", "node-name": slot.serial, "read-only": slot.readonly, "file": _empty(slot.readonly)}
        node["discard"] = "unmap"
        arguments += ["-blockdev", json.dumps(node)]
        arguments += ["-device", f"virtio-blk-device,drive={slot.serial},serial={slot.serial}"]
    for number, network in enumerate(spec.networks):
        arguments += ["-netdev", f"tap,id=n{number},ifname={network.tap},script=no,downscript=no"]
        arguments += ["-device", f"virtio-net-device,netdev=n{number},mac={network.mac}"]
    if spec.reclaim:
        arguments += ["-device", "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on"]
    if spec.incoming:
        arguments += ["-incoming", "defer"]
    return tuple(arguments)


def _empty(readonly: bool) -> dict[str, Any]:
    """Return the medium of an empty slot: zeros."""
    return {"driver": "null-co", "read-zeroes": True, "size": SLOT_BYTES, "read-only": readonly}


def _quote(value: str) -> str:
    """QEMU splits options at commas; a doubled one stands for itself."""
    return value.replace(",", ",,")


def find_binary() -> str:
    """Return the path of QEMU.

    Raises:
        FailedPreconditionError: it is not installed; the message names the package.
    """
    if (path := find_program(BINARY)) is not None:
        return path
    raise FailedPreconditionError(
        f"{BINARY} is not installed", fix="install it: apt-get install qemu-system-x86 (or run `make system`)"
    )


class QemuMachine(MonitorProcess):
    """One QEMU process. Not thread-safe, except that `kill` and `reap` may come from another thread."""

    def __init__(
        self,
        pid: int,
        qmp: socket.socket,
        console: socket.socket,
        directory: Path,
        slots: dict[str, bool] | None = None,
    ) -> None:
        """`slots`: whether each is read-only, by serial."""
        super().__init__(pid, console)
        self._qmp = QmpClient(qmp)
        self._directory = directory
        self._slots = slots or {}
        self._media = 0
        #: The node that a command has put into a slot.
        self._inserted: dict[str, str] = {}
        #: Descriptors behind a slot's medium.
        self._fd_sets: dict[str, int] = {}

    @property
    def channel_directory(self) -> Path:
        return self._directory

    def connect(self, timeout_s: float) -> None:
        self._qmp.handshake(timeout_s)

    def pause(self) -> None:
        self._qmp.command("stop")

    def resume(self) -> None:
        self._qmp.command("cont")

    def restore(self, state: Path, timeout_s: float) -> None:
        state_fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._qmp.command("migrate-set-capabilities", _IGNORE_SHARED)
            self._qmp.command("getfd", {"fdname": "state"}, fds=[state_fd])
        finally:
            os.close(state_fd)
        self._qmp.command("migrate-incoming", {"uri": "fd:state"})
        deadline_s = time.monotonic() + timeout_s
        # The state of a machine whose memory lies in a file is 50 KB: it is read in a few milliseconds.
        while (status := self._qmp.command("query-status")["status"]) == "inmigrate":
            self._pause(deadline_s, "load the saved state", timeout_s)
        if status not in ("paused", "prelaunch", "running"):
            raise FailedPreconditionError(f"QEMU could not load the saved state: it is now '{status}'")
        self._qmp.command("cont")

    def save(self, state: Path, timeout_s: float) -> None:
        state_fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._save(state_fd, timeout_s)
            os.fsync(state_fd)
        finally:
            os.close(state_fd)

    def _save(self, state_fd: int, timeout_s: float) -> None:
        self._qmp.command("stop")
        self._qmp.command("migrate-set-capabilities", _IGNORE_SHARED)
        self._qmp.command("migrate-set-parameters", {"max-bandwidth": 1 << 34})
        self._qmp.command("getfd", {"fdname": "state"}, fds=[state_fd])
        self._qmp.command("migrate", {"uri": "fd:state"})
        deadline_s = time.monotonic() + timeout_s
        while (progress := self._qmp.command("query-migrate")).get("status") != "completed":
            if progress.get("status") in ("failed", "cancelled"):
                raise FailedPreconditionError(
                    f"QEMU could not save the machine: {progress.get('error-desc', progress['status'])}",
                    fix="check the free space of the state directory",
                )
            self._pause(deadline_s, "save the machine", timeout_s)

    def insert(self, serial: str, path: Path) -> None:
        self._change(serial, {"driver": "file", "filename": str(path), "read-only": self._slots[serial]})

    def insert_device(self, serial: str, fd: int) -> None:
        added = int(self._qmp.command("add-fd", fds=[fd])["fdset-id"])
        readonly = self._slots[serial]
        # Whoever opened it has claimed it, which holds against more than other QEMUs.
        medium = {"driver": "host_device", "filename": f"/dev/fdset/{added}", "read-only": readonly, "locking": "off"}
        try:
            self._change(serial, {**medium, "discard": "unmap"})
        except BaseException:
            self._qmp.command("remove-fd", {"fdset-id": added})
            raise
        self._fd_sets[serial] = added

    def eject(self, serial: str) -> None:
        self._change(serial, _empty(self._slots[serial]))
        if (added := self._fd_sets.pop(serial, None)) is not None:
            self._qmp.command("remove-fd", {"fdset-id": added})

    def _change(self, serial: str, medium: dict[str, Any]) -> None:
        self._media += 1
        node = f"medium{self._media}"
        self._qmp.command("blockdev-add", {"node-name": node, **medium})
        whole = {"driver": "raw", "node-name": serial, "read-only": self._slots[serial], "file": node}
        whole["discard"] = "unmap"
        try:
            self._qmp.command("blockdev-reopen", {"options": [whole]})
        except FailedPreconditionError:
            self._qmp.command("blockdev-del", {"node-name": node})
            raise
        before = self._inserted.pop(serial, None)
        if before is not None:
            self._qmp.command("blockdev-del", {"node-name": before})
        self._inserted[serial] = node

    @staticmethod
    def _pause(deadline_s: float, what: str, timeout_s: float) -> None:
        if time.monotonic() > deadline_s:
            raise DeadlineExceededError(f"QEMU did not {what} within {timeout_s:g} s")
        time.sleep(0.001)

    def close(self) -> None:
        super().close()
        self._qmp.close()


class QemuDriver:
    """Starts microVMs with the QEMU that is installed."""

    name = "qemu"
    capabilities = _CAPABILITIES

    def __init__(self, binary: str | None = None) -> None:
        self.binary = binary or find_binary()
        self._version = ""

    @property
    def version(self) -> str:
        if not self._version:
            self._version = version_of(self.binary, r"version (\d+\.\d+\.\d+)", "QEMU")
        return self._version

    def check(self, spec: VmSpec) -> None:
        check(spec)

    def start(
        self, spec: VmSpec, *, directory: Path, channel_fd: int | None = None, keep_fds: tuple[int, ...] = ()
    ) -> QemuMachine:
        if channel_fd is None:
            raise InvalidArgumentError("QEMU needs the host's end of the guest's channel")
        qmp, qmp_child = socket.socketpair()
        console, console_child = socket.socketpair()
        with qmp_child, console_child:
            try:
                pid = spawn(
                    command_line(
                        spec,
                        binary=self.binary,
                        qmp_fd=qmp_child.fileno(),
                        console_fd=console_child.fileno(),
                        channel_fd=channel_fd,
                    ),
                    keep_fds=(qmp_child.fileno(), console_child.fileno(), channel_fd, *keep_fds),
                    output_fd=console_child.fileno(),
                )
            except BaseException:
                qmp.close()
                console.close()
                raise
        return QemuMachine(pid, qmp, console, directory, {slot.serial: slot.readonly for slot in spec.slots})


def _conforms(machine: QemuMachine, driver: QemuDriver) -> tuple[SlottedMachine, Driver]:
    """mypy proves here that the classes fulfil the contract."""
    return machine, driver
