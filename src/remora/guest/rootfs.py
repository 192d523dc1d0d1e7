"""Makes the container's root: read-only layers from disks, a writable layer in memory, further disks, and the files by
which a function reaches Remora (/run/remora)."""

from __future__ import annotations

import os

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.guest import bundle, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from remora.wire.guest_v1 import Mount, SetupRequest

BASE = "/run/guest"
BUNDLE = f"{BASE}/bundle"
ROOT = f"{BUNDLE}/rootfs"
#: Bound into the container as /run/remora.
SHARED = f"{BASE}/remora"
_SDK = "/usr/share/remora/sdk"
#: What PID 1 and the kernel need besides the container.
_RESERVE_BYTES = 32 << 20


def memory_bytes() -> Dict[str, int]:
    """Return the guest's `MemTotal` and `MemAvailable` in bytes."""
    found = {}
    for line in system.read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def container_limit(total: int) -> int:
    """Return the container's memory limit: a function that needs more is ended, and the guest stays reachable."""
    return max(total - _RESERVE_BYTES, total // 2)


def prepare() -> None:
    """Make the directories that the control service's other parts listen in. Done once at boot."""
    for path in (BASE, BUNDLE, SHARED, f"{SHARED}/sdk"):
        os.makedirs(path, exist_ok=True)


def setup(request: SetupRequest) -> List[Dict[str, Any]]:
    """Mount the container's root and return the OCI mounts that its bundle needs.

    Raises:
        InvalidArgumentError: no layers, or a path that is not absolute.
        FailedPreconditionError: a disk is not attached, or does not mount.
    """
    if not request.layers:
        raise InvalidArgumentError("Setup names no layers: a container needs at least one")
    disks = system.disks()
    lower = [mount_disk(disks, serial, f"{BASE}/layers/{index}") for index, serial in enumerate(request.layers)]
    _mount_root(lower, request.overlay_bytes or memory_bytes()["MemTotal"] // 2)
    mounts = []
    for index, mount in enumerate(request.mounts):
        mounts.append(_extra_mount(disks, mount, f"{BASE}/mounts/{index}"))
    mounts.append(bundle.bind(SHARED, "/run/remora", readonly=True))
    mounts.append(bundle.bind(_SDK, bundle.SDK, readonly=True))
    mounts.append(bundle.bind(f"{BASE}/hostname", "/etc/hostname", readonly=False))
    mounts.append(bundle.bind(f"{BASE}/hosts", "/etc/hosts", readonly=False))
    return mounts


def set_hostname(name: str) -> None:
    """Name the guest; its container sees the same name, and the same files, at once."""
    import _socket

    hostname = name or "remora"
    _socket.sethostname(hostname)
    system.write_text(f"{BASE}/hostname", hostname + "\n")
    system.write_text(f"{BASE}/hosts", f"127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost\n")


def image_file(path: str) -> str:
    """Return a text file of the image; empty if it has none."""
    try:
        return system.read_text(ROOT + path)
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _mount_root(lower: List[str], size: int) -> None:
    writable = f"{BASE}/writable"
    os.makedirs(writable, exist_ok=True)
    os.makedirs(ROOT, exist_ok=True)
    system.mount("tmpfs", "writable", writable, f"size={size},mode=755")
    os.mkdir(f"{writable}/upper")
    os.mkdir(f"{writable}/work")
    # overlayfs wants the topmost layer first.
    options = f"lowerdir={':'.join(reversed(lower))},upperdir={writable}/upper,workdir={writable}/work"
    mount_or_explain("overlay", "root", ROOT, options)


def mount_disk(disks: Dict[str, str], serial: str, target: str, kind: str = "erofs", readonly: bool = True) -> str:
    device = disks.get(serial)
    if device is None:
        raise FailedPreconditionError(
            f"no disk with serial {serial!r} is attached; attached: {', '.join(disks) or 'none'}",
            fix="attach it as virtio-blk before the microVM starts",
        )
    os.makedirs(target, exist_ok=True)
    mount_or_explain(kind, device, target, "ro" if readonly else "rw")
    return target


def _extra_mount(disks: Dict[str, str], mount: Mount, place: str) -> Dict[str, Any]:
    if not mount.destination.startswith("/"):
        raise InvalidArgumentError(f"mount destination {mount.destination!r} is not an absolute path")
    if mount.type == "tmpfs":
        mode = "ro" if mount.readonly else "rw"
        options = ["nosuid", "nodev", "mode=1777", mode]
        return {"destination": mount.destination, "type": "tmpfs", "source": "tmpfs", "options": options}
    if mount.type != "disk":
        raise InvalidArgumentError(f"mount type {mount.type!r} is none of: disk, tmpfs")
    kind = file_system(disks.get(mount.source, ""))
    mount_disk(disks, mount.source, place, kind, mount.readonly or kind == "erofs")
    return bundle.bind(place, mount.destination, mount.readonly)


def file_system(device: str) -> str:
    """Tell erofs (magic 0xE0F5E1E2 at 1024) from ext4 (0xEF53 at 1080)."""
    if not device:
        return "erofs"  # mounting reports that the disk is missing
    with open(device, "rb") as file:
        start = file.read(2048)
    return "ext4" if start[1080:1082] == b"\x53\xef" else "erofs"


def mount_or_explain(kind: str, source: str, target: str, options: str) -> None:
    try:
        system.mount(kind, source, target, options)
    except OSError as error:
        raise FailedPreconditionError(f"cannot mount {source} as {kind}: {error}") from error
