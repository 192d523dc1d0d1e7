"""The pod's microVM: its processes, its disks, and the way to its guest.

The reactor's thread starts the monitor process, which dies with it, and watches its end; everything else here blocks
and is called from the threads that serve containerd's slow requests.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from remora import paths
from remora.errors import RemoraError, UnavailableError
from remora.guest.kernel import OS_DISK_SERIAL, POD_ARGUMENT, kernel_arguments
from remora.reactor import READ, Reactor
from remora.sandboxes.clearing import process_start
from remora.sandboxes.endings import why_ended
from remora.sandboxes.guest import Guest, connect_when_up, identity
from remora.sandboxes.guest_files import guest_files
from remora.shim import boot_gate, network
from remora.shim.settings import Settings, Size
from remora.shim.slots import Slots
from remora.shim.tools import run
from remora.vmm.bridge import Bridge
from remora.vmm.contract import Disk, SlottedMachine, VmSpec
from remora.vmm.probe import accelerator
from remora.vmm.qemu import QemuDriver
from remora.vmm.tsc import host_tsc_khz
from remora.wire import guest_pod_v1 as v1

_SCRATCH_SERIAL = "scratch"
_QMP_TIMEOUT_S = 30.0
T = TypeVar("T")


class MicroVm:
    def __init__(
        self, reactor: Reactor, directory: Path, settings: Settings, on_end: Callable[[RemoraError], None]
    ) -> None:
        """`on_end` is called in the reactor's thread when the machine has ended by itself."""
        self._reactor = reactor
        self._thread = threading.main_thread().ident
        self.directory = directory
        self._settings = settings
        self._on_end = on_end
        self._machine: SlottedMachine | None = None
        #: The scratch disk; -1: there is none.
        self._scratch_fd = -1
        self._bridge: Bridge | None = None
        self._guest: Guest | None = None
        self._slots: Slots | None = None
        self.ended: RemoraError | None = None
        #: When a stage of the boot was reached, by the monotonic clock.
        self.moments: dict[str, float] = {}

    # -- life -------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._machine.pid if self._machine is not None else 0

    @property
    def slots(self) -> Slots:
        """What its disks hold, from `boot` on."""
        assert self._slots is not None
        return self._slots

    def _alive(self) -> SlottedMachine | None:
        return self._machine if self.ended is None else None

    def machine_fields(self) -> dict[str, Any]:
        """Return what a record needs so that others can end this machine (sandboxes/clearing.py)."""
        return {"machine_pid": self.pid, "machine_started": process_start(self.pid)}

    def boot(self, size: Size, net: network.Found, name: str, hostname: str, sysctls: dict[str, str]) -> None:
        """Start the machine and set up its guest.

        Raises:
            RemoraError: it did not come up; nothing runs then.
        """
        vm = self._spec(size, net)
        self.moments["disks_ready"] = time.monotonic()
        with boot_gate.turn(paths.state_dir(), vm.accelerator):
            self.moments["turn_came"] = time.monotonic()
            self._boot(vm, self._settings.boot_timeout_s)
        self.moments["guest_up"] = time.monotonic()
        self.pod(
            "Configure",
            v1.ConfigureRequest(
                identity=identity(name, hostname),
                scratch=_SCRATCH_SERIAL if self._settings.scratch_mib else "",
                links=list(net.links),
                addresses=list(net.addresses),
                routes=list(net.routes),
                sysctls=[v1.Sysctl(name=key, value=value) for key, value in sysctls.items()],
            ),
        )

    def _boot(self, vm: VmSpec, timeout_s: float) -> None:
        if self.ended is not None:
            raise self.ended
        self.in_reactor(lambda: self._start(vm))
        try:
            self._guest = self._come_up(timeout_s)
        except UnavailableError:
            if self.ended is not None:
                raise self.ended from None
            # A guest under emulation may hang while it boots (guest clock, busy host): once more, with more time.
            self.in_reactor(self._drop)
            self.in_reactor(lambda: self._start(vm))
            self._guest = self._come_up(2 * timeout_s)

    def kill(self) -> None:
        """End the machine from any thread; every call to its guest fails from then on."""
        if self.ended is None:
            self.ended = UnavailableError("the pod's microVM was ended")
        if self._machine is not None:
            self._machine.kill()

    def close(self) -> None:
        """End everything and wait until it has. Any thread but the reactor's."""
        self.kill()
        self.in_reactor(self._drop)
        if self._guest is not None:
            self._guest.close()
        if self._scratch_fd >= 0:
            os.close(self._scratch_fd)
            self._scratch_fd = -1

    def _spec(self, size: Size, net: network.Found) -> VmSpec:
        state = paths.state_dir()
        files = guest_files(state)
        accel = accelerator(files.kernel, state / "host")
        tsc_khz = host_tsc_khz(state / "host") if accel == "tcg" else None
        disks = [Disk(OS_DISK_SERIAL, files.disk)]
        if self._settings.scratch_mib:
            disks.append(Disk(_SCRATCH_SERIAL, self._scratch(), readonly=False))
        # With the balloon.
        self._slots = Slots(self._alive, len(disks) + len(net.networks) + 1)
        return VmSpec(
            kernel=files.kernel,
            initrd=files.initrd,
            arguments=kernel_arguments(tsc_khz, extra=[POD_ARGUMENT]),
            memory_mib=size.memory_mib,
            cpus=size.cpus,
            accelerator=accel,
            disks=tuple(disks),
            networks=net.networks,
            slots=self._slots.spec,
            reclaim=True,
        )

    def _scratch(self) -> Path:
        """Make the pod's writable disk: sparse, empty, and without a name, so that nothing can leave it behind.

        On the state directory's disk, because the run-time directory is memory on most hosts.
        """
        state = paths.state_dir()
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._scratch_fd = os.open(state, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            # A file system without such files (NFS): a name for a moment.
            name = state / f".scratch-{self.directory.name}"
            self._scratch_fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            name.unlink()
        os.ftruncate(self._scratch_fd, self._settings.scratch_mib << 20)
        # No journal: it lives no longer than the machine. Lazy tables: 20 ms instead of seconds.
        options = ["-E", "lazy_itable_init=1,nodiscard", "-O", "^has_journal,^resize_inode", "-m", "0", "-F", "-q"]
        run(["mkfs.ext4", *options, f"/proc/{os.getpid()}/fd/{self._scratch_fd}"], package="e2fsprogs")
        return Path(f"/proc/self/fd/{self._scratch_fd}")

    def _come_up(self, timeout_s: float) -> Guest:
        assert self._machine is not None
        self._machine.connect(_QMP_TIMEOUT_S)
        return connect_when_up(self.directory, timeout_s)

    # -- the guest --------------------------------------------------------------------------------------------------

    @property
    def guest(self) -> Guest:
        """The guest's processes, by their ids.

        Raises:
            UnavailableError: the machine has ended.
        """
        if self.ended is not None:
            raise self.ended
        if self._guest is None:
            raise UnavailableError("the pod's microVM is not up")
        return self._guest

    def pod(self, method: str, request: Any, timeout_s: float | None = 60.0) -> Any:
        """Call the pod service of the guest; without `timeout_s`, until it answers or ends."""
        return self.guest.call(v1.SERVICE, method, request, v1.METHODS[method][1], timeout_s)

    # -- the reactor's thread ---------------------------------------------------------------------------------------

    def in_reactor(self, call: Callable[[], T]) -> T:
        """Have the reactor's thread make a call; return what it returns, or raise what it raises."""
        if threading.get_ident() == self._thread:
            return call()
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def wrapped() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asked
                errors.append(error)
            finally:
                done.set()

        self._reactor.post(wrapped)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def _start(self, vm: VmSpec) -> None:
        channel, guest_end = socket.socketpair()
        try:
            keep_fds = () if self._scratch_fd < 0 else (self._scratch_fd,)
            machine = QemuDriver().start(vm, directory=self.directory, channel_fd=guest_end.fileno(), keep_fds=keep_fds)
        except BaseException:
            channel.close()
            raise
        finally:
            guest_end.close()
        self._machine = machine
        self._reactor.watch_pid(machine.pid, lambda: self._machine_ended(machine))
        self._reactor.register(machine.console.fileno(), READ, lambda _events: self._read_console(machine))
        self._bridge = Bridge(self._reactor, channel, self.directory, on_end=lambda error: self._channel_ended(machine))

    def _read_console(self, machine: SlottedMachine) -> None:
        if not machine.read_console():
            self._reactor.unregister(machine.console.fileno())

    def _channel_ended(self, machine: SlottedMachine) -> None:
        """A guest that breaks the channel's rules is ended; one whose monitor goes is reported by its end."""
        if machine is self._machine:
            machine.kill()

    def _machine_ended(self, machine: SlottedMachine) -> None:
        ended = machine.reap()
        if machine is not self._machine or ended is None:
            return
        if self.ended is None:
            self.ended = why_ended(ended)
        if self._bridge is not None:
            self._bridge.close()
        self._on_end(self.ended)

    def _drop(self) -> None:
        machine, self._machine = self._machine, None
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.close()
        if machine is not None:
            self._reactor.unregister(machine.console.fileno())
            machine.close()
