"""What every microVM driver must do, so that a sandbox never knows which monitor runs it.

A driver turns a frozen `VmSpec` into a command line by a pure function and runs it as a `Machine`. It declares what it
can do as `Capabilities`; a sandbox asks for a feature by its capability and never by the driver's name.

NamedTuples and not dataclasses: every `remora run` imports this, and `dataclasses` costs 15 ms of import.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

Accelerator = Literal["kvm", "tcg"]


#: `stream`: the monitor carries bytes between guest and a socket, and the host speaks the mux on it (vmm/bridge.py);
#: `vsock`: the guest has a vsock device and the monitor itself serves hybrid sockets (vmm/channel.py).
ChannelKind = Literal["stream", "vsock"]


class Capabilities(NamedTuple):
    """What a driver can do. `emulation`: it also runs without KVM."""

    snapshot: bool
    clone: bool
    live_migration: bool
    hot_plug: bool
    emulation: bool
    channel: ChannelKind
    #: Disks of one machine, beside its other devices.
    max_disks: int


class Rate(NamedTuple):
    """What a device may do in a second; 0: as much as it can. A burst of one second's worth is allowed."""

    bytes_per_s: int = 0
    operations_per_s: int = 0


class Disk(NamedTuple):
    """A block device; the guest finds it by its serial (at most 20 bytes, as virtio-blk carries it)."""

    serial: str
    path: Path
    readonly: bool = True
    rate: Rate = Rate()


class Slot(NamedTuple):
    """A disk whose medium comes while the machine runs (`SlottedMachine.insert`); until then it is empty. Made because
    microVM machines have no hot-plug, while every monitor can change the file behind a disk."""

    serial: str
    readonly: bool = True


class Network(NamedTuple):
    """A network device on a tap that exists in the network namespace in which the monitor runs."""

    tap: str
    #: As `02:00:00:00:00:01`.
    mac: str
    mtu: int = 1500
    #: What the guest may receive and send.
    receive: Rate = Rate()
    send: Rate = Rate()


class VmSpec(NamedTuple):
    """Everything that makes one virtual machine, apart from the sockets of its process.

    A clone must have the same values as its template except for `ram_private` and `incoming`.
    """

    kernel: Path
    initrd: Path
    #: Kernel command line.
    arguments: str
    memory_mib: int
    cpus: int
    accelerator: Accelerator
    #: In the order in which the guest sees them.
    disks: tuple[Disk, ...] = ()
    networks: tuple[Network, ...] = ()
    slots: tuple[Slot, ...] = ()
    #: File that holds the guest's memory (templates and clones); None: anonymous memory.
    ram_file: Path | None = None
    #: True: writes stay private to this machine (a clone); False: they go to `ram_file` (a template).
    ram_private: bool = False
    #: True: start without running and wait for a saved state.
    incoming: bool = False
    #: True: the guest gives memory that it has freed back to the host. Not for clones (their memory is a private file).
    reclaim: bool = False


class Ended(NamedTuple):
    """How a machine's process ended: `signal` if it was killed, else `status`; `console` is its last output."""

    status: int
    signal: int
    console: str


class Machine(Protocol):
    """A running virtual machine: one process, one byte channel.

    The blocking calls raise `UnavailableError` when the process is gone and `DeadlineExceededError` when it does not
    answer in time.
    """

    @property
    def pid(self) -> int: ...

    @property
    def console(self) -> socket.socket:
        """What the guest's console and the process itself write; its owner calls `read_console` when it is ready."""

    @property
    def channel_directory(self) -> Path:
        """Where the guest's channel is (vmm/channel.py); it must be listened in before `connect` if the guest is to
        reach a port from its first moment on."""

    def read_console(self) -> bool:
        """Take what was written and keep its tail; False at its end."""

    def connect(self, timeout_s: float) -> None:
        """Wait until the process takes commands, and start the guest unless it was made with `incoming`."""

    def pause(self) -> None:
        """Stop the guest's CPUs until `resume`; its streams stay."""

    def resume(self) -> None:
        """Let the guest go on."""

    def restore(self, state: Path, timeout_s: float) -> None:
        """Load what `save` wrote into a machine made with `incoming`, and let it run."""

    def save(self, state: Path, timeout_s: float) -> None:
        """Stop the guest and write its state to `state`, which must not exist: a file, or a directory for a monitor
        that writes several. Without the memory, where that lies in `ram_file`."""

    def kill(self) -> None:
        """End the process at once; harmless if it has ended."""

    def reap(self) -> Ended | None:
        """Return how the process ended, or None while it runs. Does not block."""

    def close(self) -> None:
        """Kill and reap the process and close everything that belongs to it."""


class SlottedMachine(Machine, Protocol):
    """A machine whose slots can be filled and emptied while it runs."""

    def insert(self, serial: str, path: Path) -> None:
        """Put a medium into a slot. Its size is the slot's, whatever the file's: what lies behind the file's end is
        not to be read."""

    def insert_device(self, serial: str, fd: int) -> None:
        """Put an open block device of the host into a slot; the machine keeps a copy of the descriptor until `eject`.
        What the guest flushes reaches the device before its flush is answered."""

    def eject(self, serial: str) -> None:
        """Empty a slot that the guest no longer uses."""


class Driver(Protocol):
    """A virtual machine monitor that is installed on this host."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def binary(self) -> str:
        """Path of the monitor's program."""

    @property
    def version(self) -> str:
        """Version of the monitor: a saved state is loaded by the same version only."""

    def check(self, spec: VmSpec) -> None:
        """Refuse a machine that this monitor cannot hold or run here.

        Raises:
            InvalidArgumentError, FailedPreconditionError: with the bound that is broken.
        """

    def start(
        self, spec: VmSpec, *, directory: Path, channel_fd: int | None = None, keep_fds: tuple[int, ...] = ()
    ) -> Machine:
        """Start a machine; does not wait for it.

        Its channel is the connected stream socket `channel_fd`, or what the monitor serves in `directory`, as
        `capabilities.channel` says. `directory` is the sandbox's own and holds what the monitor needs beside it.

        The process dies with the calling thread, whatever kills that. It inherits `keep_fds` under their numbers
        (disks whose path is `/proc/self/fd/N`).

        Raises:
            FailedPreconditionError: the monitor is not installed or cannot run here.
        """
