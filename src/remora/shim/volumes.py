"""What a pod's bind mounts are, and how each gets into the guest.

The kubelet prepares volumes as directories of the host; a microVM shares none of them. So each source is recognised by
where the kubelet, or containerd, puts such things, and gets its counterpart in the guest:

    emptyDir            a directory on the pod's scratch disk, or a tmpfs for medium Memory; shared by name
    configMap, secret,  a copy, sent again when the kubelet has changed it (see syncing.py)
    projected, downward
    hosts, resolv.conf, a copy; changes by the kubelet follow
    hostname
    termination log     a file in the guest, brought back before the container's end is reported
    hostPath, read-only a packed snapshot of the moment, as a disk
    anything writable   refused by name
"""

from __future__ import annotations

import os
import re
import stat
from typing import Any, NamedTuple

from remora.errors import InvalidArgumentError
from remora.sha256 import hexdigest
from remora.wire.guest_pod_v1 import VOLUMES

_KUBELET = re.compile(r"(?P<base>.*/volumes/kubernetes\.io~(?P<plugin>[a-z-]+)/[^/]+)(?P<below>/.*)?")
_SUBPATH = re.compile(r"(?P<pod>.*)/volume-subpaths/(?P<volume>[^/]+)/[^/]+/\d+")
#: containerd puts an image's own volumes here.
_IMAGE_VOLUME = re.compile(r".*/containers/[^/]+/volumes/[^/]+")
#: The kubelet's own file for a container's last words, wherever the container has it. Nothing else is written on
#: the host: a hostPath could be mounted at the usual place, too.
_MESSAGE = re.compile(r".*/pods/[^/]+/containers/[^/]+/[0-9a-f]{8}")
_SYNCED_PLUGINS = ("configmap", "secret", "projected", "downward-api")
#: Files that containers may write, each for itself.
_OWN_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
_SHM_BYTES = 64 << 20
#: Larger files and trees go as a disk instead of a copy.
MAX_COPY_BYTES = 1 << 20
#: The one name of a volume that is a file.
FILE_NAME = "data"


class Volume(NamedTuple):
    """A volume of the pod. Its name is made of its source, so that two containers meet in the same one."""

    name: str
    #: `dir`, `tmpfs` (both of the guest), `synced` (a copy that follows), `snapshot` (a disk).
    kind: str
    #: On the host.
    source: str
    mode: int = 0o755
    gid: int = 0
    size_bytes: int = 0
    is_file: bool = False
    #: Its content at the start comes from the host.
    seeded: bool = False
    #: A file that goes back to the host when the container ends.
    returned: bool = False


class Found(NamedTuple):
    """A bind mount's volume, and where below it the mount is."""

    volume: Volume
    below: str = ""

    @property
    def guest_source(self) -> str:
        below = f"/{FILE_NAME}" if self.volume.is_file else self.below
        return f"{VOLUMES}/{self.volume.name}{below}"


def find(mount: dict[str, Any], sandbox: str) -> Found:
    """Return the volume of a bind mount.

    Raises:
        InvalidArgumentError: it cannot be had; the message names it.
    """
    source, destination = str(mount.get("source", "")), str(mount.get("destination", ""))
    if destination == "/dev/shm":
        return Found(Volume(f"shm-{sandbox[:20]}", "tmpfs", source, 0o1777, 0, _SHM_BYTES))
    try:
        info = os.stat(source)
    except OSError as error:
        raise InvalidArgumentError(f"the source {source} of the mount {destination}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
        raise InvalidArgumentError(
            f"the mount {destination} brings {source}, a {_type_name(info.st_mode)} of the host; a microVM shares none",
            fix="remove the mount; for the accelerator nothing has to be mounted",
        )
    readonly = "ro" in (mount.get("options") or [])
    found = _of_kubelet(source, info)
    if found is not None:
        return found
    if _IMAGE_VOLUME.fullmatch(source):
        return Found(_directory("dir", source, info, seeded=True))
    message = bool(_MESSAGE.fullmatch(source)) and not readonly
    copied = readonly or message or destination in _OWN_FILES
    if stat.S_ISREG(info.st_mode) and copied and info.st_size <= MAX_COPY_BYTES:
        return Found(_file(source, info, returned=message))
    if not readonly:
        raise InvalidArgumentError(
            f"the mount {destination} is writable and its source {source} is the host's (hostPath, or a volume that "
            "the host has mounted): a microVM shares no writable files with its host",
            fix="mount it read-only, or use an emptyDir",
        )
    if stat.S_ISREG(info.st_mode):
        raise InvalidArgumentError(
            f"the mount {destination} is the file {source} of {info.st_size} bytes; a file may have {MAX_COPY_BYTES}",
            fix="mount its directory read-only",
        )
    return Found(_directory("snapshot", source, info))


def _of_kubelet(source: str, info: os.stat_result) -> Found | None:
    base, below = source, ""
    subpath = _SUBPATH.fullmatch(source)
    if subpath is not None:
        base, below = _behind_subpath(source, subpath)
    match = _KUBELET.fullmatch(base + below)
    if match is None:
        return None
    base, below, plugin = match["base"], match["below"] or "", match["plugin"]
    if plugin == "empty-dir":
        top = os.stat(base)
        kind = "tmpfs" if _is_tmpfs(base) else "dir"
        return Found(_directory(kind, base, top, seeded=kind == "dir"), below)
    if plugin not in _SYNCED_PLUGINS:
        return None
    if stat.S_ISREG(info.st_mode):
        # A subPath file: by its content alone, as it never follows updates (Kubernetes' rule for subPath).
        return Found(_file(source, info))
    return Found(_directory("synced", base, os.stat(base)), below)


def _behind_subpath(source: str, match: re.Match[str]) -> tuple[str, str]:
    """Return what the kubelet has bound to a subPath's place: the volume's directory, and the path below it."""
    inside = ""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if fields[4].encode().decode("unicode_escape") == source:
                inside = fields[3].encode().decode("unicode_escape").removesuffix("//deleted")
    plugins = f"{match['pod']}/volumes"
    try:
        plugin = next(p for p in os.listdir(plugins) if os.path.isdir(f"{plugins}/{p}/{match['volume']}"))
    except (FileNotFoundError, StopIteration):
        return source, ""
    base = f"{plugins}/{plugin}/{match['volume']}"
    marker = f"/{plugin}/{match['volume']}"
    # On a tmpfs the bound path counts from the volume itself.
    below = inside.partition(marker)[2] if marker in inside else inside
    return base, below.rstrip("/")


def _directory(kind: str, source: str, info: os.stat_result, *, seeded: bool = False) -> Volume:
    return Volume(_name(source), kind, source, stat.S_IMODE(info.st_mode), info.st_gid, seeded=seeded)


def _file(source: str, info: os.stat_result, *, returned: bool = False) -> Volume:
    return Volume(_name(source), "synced", source, stat.S_IMODE(info.st_mode), info.st_gid, 0, True, False, returned)


def _name(source: str) -> str:
    readable = re.sub(r"[^a-zA-Z0-9.]+", "-", os.path.basename(source))[:24].strip(".-")
    return f"{readable or 'v'}-{hexdigest(source.encode())[:12]}"


def _is_tmpfs(path: str) -> bool:
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            if line.split(" ")[4].encode().decode("unicode_escape") == path:
                return line.partition(" - ")[2].startswith("tmpfs ")
    return False


def _type_name(mode: int) -> str:
    if stat.S_ISSOCK(mode):
        return "socket"
    return "block device" if stat.S_ISBLK(mode) else "device or pipe"
