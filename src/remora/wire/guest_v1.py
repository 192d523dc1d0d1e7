"""Messages of `remora.guest.v1.Guest`, the control service of PID 1 inside a microVM, on channel port 1024.

stdin, stdout and stderr are not messages: each is a raw stream of its own on channel port 1025, so that 100 MB of
stdin never stand in line with a signal. A host opens such a stream and first writes one line,
`<process id> <stdin|stdout|stderr|tty>\n`; then bytes flow, and half-close is end of file.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, bytes_, double, int32, int64, message, string, uint32, uint64

SERVICE = "remora.guest.v1.Guest"
#: ttrpc, this service.
CONTROL_PORT = 1024
#: Raw stdio streams.
STDIO_PORT = 1025


class Empty(Message):
    pass


class Identity(Message):
    """What makes this microVM different from its template. Sent at boot and after every restore."""

    sandbox: str = string(1)
    hostname: str = string(2)
    #: Host's wall clock, nanoseconds since the epoch.
    time_ns: int = int64(3)
    #: 32 or more random bytes for the kernel's generator.
    entropy: bytes = bytes_(4)


class Mount(Message):
    """A file system of a container beyond its root."""

    #: `disk` (an attached block device) or `tmpfs`.
    type: str = string(1)
    #: Serial of the block device for `disk`.
    source: str = string(2)
    #: Absolute path in the container.
    destination: str = string(3)
    readonly: bool = bool_(4)


class SetupRequest(Message):
    """Prepares the container's root: overlay of read-only layers, lowest first, below a writable tmpfs."""

    identity: Identity | None = message(1, Identity)
    #: Serials of the virtio-blk devices that hold the erofs layers, lowest first.
    layers: list[str] = string(2, repeated=True)
    mounts: list[Mount] = message(3, Mount, repeated=True)
    readonly_root: bool = bool_(4)
    #: Bound on the writable layer, bytes; 0: half of the guest's memory.
    overlay_bytes: int = uint64(5)


class Process(Message):
    args: list[str] = string(1, repeated=True)
    #: KEY=VALUE.
    env: list[str] = string(2, repeated=True)
    cwd: str = string(3)
    #: `uid[:gid]` or names of the image's /etc/passwd and /etc/group; empty for root.
    user: str = string(4)
    terminal: bool = bool_(5)
    rows: int = uint32(6)
    columns: int = uint32(7)
    #: False: the process reads end of file at once.
    stdin: bool = bool_(8)


class StartRequest(Message):
    #: `main` for the container's own process, any other id for an exec.
    id: str = string(1)
    process: Process | None = message(2, Process)


class StartResponse(Message):
    pid: int = uint32(1)


class WaitRequest(Message):
    id: str = string(1)
    #: How long after the end an answer may wait for a slow reader of the output; 0: as long as it takes.
    drain_s: float = double(2)


class WaitResponse(Message):
    """Sent when the process has ended and all its output has been handed to its streams."""

    #: As a shell has it: 128 + n for signal n.
    exit_status: int = int32(1)
    oom_killed: bool = bool_(2)
    #: How many processes of its container were killed for want of memory since that was started.
    oom_kills: int = uint64(3)


class SignalRequest(Message):
    id: str = string(1)
    signal: int = uint32(2)
    #: True: every process of the container.
    all: bool = bool_(3)


class ResizeRequest(Message):
    id: str = string(1)
    rows: int = uint32(2)
    columns: int = uint32(3)


class CloseStdinRequest(Message):
    id: str = string(1)


class StatsResponse(Message):
    memory_bytes: int = uint64(1)
    memory_limit_bytes: int = uint64(2)
    cpu_us: int = uint64(3)
    processes: int = uint32(4)
    uptime_s: float = double(5)
    guest_memory_total_bytes: int = uint64(6)
    guest_memory_available_bytes: int = uint64(7)


class DevicesResponse(Message):
    """What hardware the guest sees: the proof that it holds no accelerator."""

    #: `<bus>:<device>:<driver or class>` of everything on the virtio, pci and platform buses that matters.
    devices: list[str] = string(1, repeated=True)
    #: Character and block device nodes in the container's /dev.
    nodes: list[str] = string(2, repeated=True)
    kernel: str = string(3)


class WaitReadyResponse(Message):
    """Sent when the function has called `remora.ready()`."""


METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "Setup": (SetupRequest, Empty),
    "Start": (StartRequest, StartResponse),
    "Wait": (WaitRequest, WaitResponse),
    "Signal": (SignalRequest, Empty),
    "Resize": (ResizeRequest, Empty),
    "CloseStdin": (CloseStdinRequest, Empty),
    "Stats": (Empty, StatsResponse),
    "Devices": (Empty, DevicesResponse),
    # Templates: returns once `main` has called remora.ready(); it stays blocked there.
    "WaitReady": (Empty, WaitReadyResponse),
    # After a restore: new hostname, clock, entropy; then lets remora.ready() return in `main`.
    "Resume": (Identity, Empty),
    "Sync": (Empty, Empty),
    # Ends every process and powers off; the connection closes.
    "Shutdown": (Empty, Empty),
    "Ping": (Empty, Empty),
}
