"""Messages of `remora.guest.v1.Pod`: several containers in one microVM, each from an OCI bundle that the host wrote.

Beside `guest_v1` on channel port 1024: its Wait, Signal, Resize, CloseStdin and its stdio streams serve these processes
too. A process id is `<container>` for a container's own process and `<container>/<exec>` for any other.

The host decides everything that a bundle says; the guest never reads config.json. Volumes are directories below
`VOLUMES/<name>` in the guest, which the bundles bind into the containers.
"""

from __future__ import annotations

from remora.wire.guest_v1 import Empty, Identity, StartResponse
from remora.wire.protobuf import Message, bool_, bytes_, message, string, uint32, uint64

SERVICE = "remora.guest.v1.Pod"
#: Raw TCP forwards: a host first writes one line, `<port>\n`; then bytes flow to 127.0.0.1 or ::1 in the guest.
FORWARD_PORT = 1026
#: Where a bundle's bind mounts find volumes, the accelerator's files and the SDK in the guest.
VOLUMES = "/run/guest/volumes"
SHARED = "/run/guest/remora"
SDK = "/usr/share/remora/sdk"
#: The PID namespace that containers share by request, as a file.
SHARED_PIDS = "/run/guest/shared-pids"
#: Of a container's cgroup in the guest: `/remora/<container>`.
CGROUP_PARENT = "/remora"
#: Largest content of one PutFiles; longer files come in parts.
MAX_PART_BYTES = 1 << 20


class Address(Message):
    #: `10.88.0.5/16`.
    prefix: str = string(1)
    #: Interface, for ConfigureRequest.
    interface: str = string(2)


class Link(Message):
    """A network card of the guest, found by its MAC address, and what it is to be called."""

    mac: str = string(1)
    name: str = string(2)
    mtu: int = uint32(3)


class Route(Message):
    #: `default`, or a prefix.
    destination: str = string(1)
    #: Empty: on the link.
    gateway: str = string(2)
    interface: str = string(3)
    source: str = string(4)


class Sysctl(Message):
    name: str = string(1)
    value: str = string(2)


class ConfigureRequest(Message):
    """Once, before the first container."""

    identity: Identity | None = message(1, Identity)
    #: Serial of the writable disk for the containers' upper layers and disk volumes; empty: they lie in memory.
    scratch: str = string(2)
    links: list[Link] = message(3, Link, repeated=True)
    addresses: list[Address] = message(4, Address, repeated=True)
    routes: list[Route] = message(5, Route, repeated=True)
    sysctls: list[Sysctl] = message(6, Sysctl, repeated=True)


class Volume(Message):
    """A directory that containers of the pod share; made when the first container names it."""

    name: str = string(1)
    #: `dir` (on the scratch disk), `tmpfs`, or `disk` (a block device with a file system).
    kind: str = string(2)
    #: Serial, for `disk`.
    serial: str = string(3)
    #: Bound of a tmpfs; 0: half of the memory.
    size_bytes: int = uint64(4)
    #: Permission bits of the directory.
    mode: int = uint32(5)
    #: Owning group, 0 for root.
    gid: int = uint32(6)


class CreateRequest(Message):
    id: str = string(1)
    #: The whole config.json. Its root is `rootfs`.
    config: bytes = bytes_(2)
    #: Serials of the disks with the image's layers, lowest first.
    layers: list[str] = string(3, repeated=True)
    volumes: list[Volume] = message(4, Volume, repeated=True)
    #: The container joins the pod's PID namespace, which is made if need be: `/proc/self/ns/...` of PAUSE.
    shared_pids: bool = bool_(5)
    #: Serials of disks that are the container's devices, of AttachDisk.
    devices: list[str] = string(6, repeated=True)


class AttachDiskRequest(Message):
    """Before the Create that names it: a disk's medium is a device that a container is to see in its true size."""

    serial: str = string(1)
    size_bytes: int = uint64(2)


class AttachDiskResponse(Message):
    #: Of the device node in the guest.
    major: int = uint32(1)
    minor: int = uint32(2)


class StartRequest(Message):
    id: str = string(1)
    terminal: bool = bool_(2)
    stdin: bool = bool_(3)
    #: For error messages.
    command: str = string(4)


class ExecRequest(Message):
    #: `<container>/<exec>`.
    id: str = string(1)
    #: The OCI `process` object as JSON.
    process: bytes = bytes_(2)
    terminal: bool = bool_(3)
    stdin: bool = bool_(4)
    command: str = string(5)


class ContainerRequest(Message):
    id: str = string(1)


class UpdateRequest(Message):
    id: str = string(1)
    #: OCI `linux.resources` as JSON.
    resources: bytes = bytes_(2)


class StatsResponse(Message):
    """A container's cgroup; bytes, microseconds and counts. A limit of 0 is none."""

    memory_bytes: int = uint64(1)
    memory_limit_bytes: int = uint64(2)
    anon_bytes: int = uint64(3)
    inactive_file_bytes: int = uint64(4)
    page_faults: int = uint64(5)
    major_faults: int = uint64(6)
    cpu_us: int = uint64(7)
    cpu_user_us: int = uint64(8)
    cpu_system_us: int = uint64(9)
    cpu_periods: int = uint64(10)
    cpu_throttled: int = uint64(11)
    cpu_throttled_us: int = uint64(12)
    pids: int = uint64(13)
    pids_limit: int = uint64(14)
    oom_kills: int = uint64(15)
    #: Of the whole guest: MemTotal.
    guest_memory_bytes: int = uint64(16)


class OomKillsRequest(Message):
    """Answered once there are kills later than this number; the host asks anew when it wants to know of more."""

    seen: int = uint64(1)


class OomKills(Message):
    #: Container whose processes the guest's kernel has killed for want of memory.
    id: str = string(1)
    #: How many, since it was started.
    kills: int = uint64(2)


class OomKillsResponse(Message):
    #: What to ask with the next time; grows with each kill, in whichever container.
    number: int = uint64(1)
    containers: list[OomKills] = message(2, OomKills, repeated=True)


class PidsResponse(Message):
    #: In the guest.
    pids: list[int] = uint32(1, repeated=True)


class File(Message):
    """One entry of a volume. Names are relative to it and have no `..`."""

    path: str = string(1)
    #: `file`, `dir` or `link`.
    kind: str = string(2)
    mode: int = uint32(3)
    uid: int = uint32(4)
    gid: int = uint32(5)
    #: Of a file, from `offset` on; or where a link points.
    content: bytes = bytes_(6)
    offset: int = uint64(7)


class PutFilesRequest(Message):
    """Puts files into a volume, in order. A link replaces what has its name in one step, so a reader sees either."""

    volume: str = string(1)
    files: list[File] = message(2, File, repeated=True)
    #: Paths to remove afterwards, with all below them.
    remove: list[str] = string(3, repeated=True)


class GetFileRequest(Message):
    volume: str = string(1)
    path: str = string(2)
    limit: int = uint32(3)


class GetFileResponse(Message):
    content: bytes = bytes_(1)


METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "Configure": (ConfigureRequest, Empty),
    "Create": (CreateRequest, Empty),
    "AttachDisk": (AttachDiskRequest, AttachDiskResponse),
    "Start": (StartRequest, StartResponse),
    "Exec": (ExecRequest, StartResponse),
    # Ends what still runs of the container and takes its root down.
    "Remove": (ContainerRequest, Empty),
    "Pause": (ContainerRequest, Empty),
    "Resume": (ContainerRequest, Empty),
    "Update": (UpdateRequest, Empty),
    "Stats": (ContainerRequest, StatsResponse),
    "Pids": (ContainerRequest, PidsResponse),
    # Returns once a container has lost a process for want of memory: its own limit's, or all of the guest's.
    "OomKills": (OomKillsRequest, OomKillsResponse),
    "PutFiles": (PutFilesRequest, Empty),
    "GetFile": (GetFileRequest, GetFileResponse),
}
