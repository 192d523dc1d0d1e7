"""Block devices of the host that a container asks for (`volumeDevices` of a pod): which may be had, and how.

The kubelet names them in `linux.devices` by number; the cgroup rules of the same configuration say whether they may be
written. A microVM gets one as a disk. What the host itself uses is never given away: a device with a mounted file
system on it, below it (its partitions), or above it (device mapper, RAID, loop devices) is refused, and one that is to
be written is claimed (O_EXCL, open(2)) for as long as the microVM has it, so that nobody can mount it meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from remora.errors import FailedPreconditionError, InvalidArgumentError

#: linux/fs.h: size in bytes.
_BLKGETSIZE64 = 0x80081272
#: Character devices that crun makes in every container: memory and terminals (Documentation/admin-guide/devices.txt).
_COMMON_MAJORS = (1, 5)
#: A look of somebody else at the device (a probe for file systems) ends sooner.
_CLAIM_S = 1.0
_SYSFS = Path("/sys/dev/block")
_DEFAULT_MODE = 0o666


class BlockDevice(NamedTuple):
    #: In the container.
    path: str
    #: On the host.
    major: int
    minor: int
    #: Of `rwm`, by the cgroup rules.
    access: str
    #: Permission bits, owner and group of the node in the container.
    mode: int
    uid: int
    gid: int

    @property
    def writable(self) -> bool:
        return "w" in self.access

    def open(self) -> tuple[int, int]:
        """Return a descriptor of the host's device and its size in bytes.

        Raises:
            FailedPreconditionError: it is not there, or the host or another pod uses it; the message says how.
        """
        node = self._node()
        if (place := _mounted_at(self.major, self.minor)) is not None:
            raise self._refusal(f"the host has it mounted at {place}", "name a device that nothing else uses")
        fd = self._claim(node)
        try:
            info = os.fstat(fd)
            if not stat.S_ISBLK(info.st_mode) or info.st_rdev != os.makedev(self.major, self.minor):
                raise self._refusal(f"{node} is another device", "correct the host's /dev")
            (size_bytes,) = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
            if not size_bytes:
                raise self._refusal("it has no medium", "attach one, as with losetup")
            if not self.writable:
                # Readers share it: the claim only showed that nobody else has one.
                reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                os.close(fd)
                fd = reader
        except BaseException:
            os.close(fd)
            raise
        return fd, int(size_bytes)

    def _node(self) -> str:
        try:
            lines = (_SYSFS / f"{self.major}:{self.minor}" / "uevent").read_text().splitlines()
        except OSError as error:
            raise self._refusal("the host has no such device any more", "attach it again") from error
        name = next((line.partition("=")[2] for line in lines if line.startswith("DEVNAME=")), "")
        return f"/dev/{name}"

    def _claim(self, node: str) -> int:
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_EXCL | os.O_CLOEXEC
        deadline_s = time.monotonic() + _CLAIM_S
        while True:
            try:
                return os.open(node, flags)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    if time.monotonic() < deadline_s:
                        time.sleep(0.05)
                        continue
                    what = "it is claimed: by another pod that writes it, a mounted file system, swap, LVM or RAID"
                    raise self._refusal(what, "name a device that nothing else uses") from error
                fix = (
                    "ask for it read-only" if error.errno in (errno.EACCES, errno.EROFS) else "look at the host's /dev"
                )
                raise self._refusal(f"{node}: {error.strerror}", fix) from error

    def _refusal(self, why: str, fix: str) -> FailedPreconditionError:
        return FailedPreconditionError(f"the device {self.path} ({self.major}:{self.minor}): {why}", fix=fix)


def asked(config: dict[str, Any]) -> list[BlockDevice]:
    """Return the block devices that a configuration names.

    Raises:
        InvalidArgumentError: it names something else that is the host's, or grants no access; the message names it.
    """
    linux = config.get("linux") or {}
    rules = (linux.get("resources") or {}).get("devices") or []
    found: list[BlockDevice] = []
    for device in linux.get("devices") or []:
        path, kind = str(device.get("path", "")), device.get("type")
        if kind in ("c", "u") and device.get("major") in _COMMON_MAJORS:
            continue  # made by crun, as in any container
        if kind != "b":
            raise InvalidArgumentError(
                f"the device {path} (type {kind!r}, {device.get('major')}:{device.get('minor')}) is the host's, and a "
                "microVM takes only block devices",
                fix="remove it: FUSE, TUN, GPUs and other character devices cannot be had; for the accelerator nothing "
                "has to be passed",
            )
        major, minor = int(device.get("major", -1)), int(device.get("minor", -1))
        access = _access(rules, major, minor)
        if "r" not in access:
            raise InvalidArgumentError(
                f"the device {path} ({major}:{minor}): no cgroup rule lets the container read it"
            )
        mode = device.get("fileMode")
        mode = _DEFAULT_MODE if mode is None else int(mode) & 0o7777
        if any(one.path == path for one in found):
            raise InvalidArgumentError(f"the device path {path} is named twice")
        found.append(
            BlockDevice(path, major, minor, access, mode, int(device.get("uid") or 0), int(device.get("gid") or 0))
        )
    return found


def _access(rules: list[dict[str, Any]], major: int, minor: int) -> str:
    """Return what the rules leave of `rwm` for a block device; a later rule changes what earlier ones said."""
    left: set[str] = set()
    for rule in rules:
        numbers = zip((rule.get("major"), rule.get("minor")), (major, minor), strict=True)
        if rule.get("type") in ("b", "a", "", None) and all(said in (None, -1, own) for said, own in numbers):
            named = set(rule.get("access") or "rwm")
            left = left | named if rule.get("allow") else left - named
    return "".join(letter for letter in "rwm" if letter in left)


def _mounted_at(major: int, minor: int) -> str | None:
    """Return where the host has a file system of this device, of its partitions, or of what is built on them."""
    related = _related(f"{major}:{minor}")
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split(" ")
            if fields[2] in related:
                return fields[4].encode().decode("unicode_escape")
    return None


def _related(number: str) -> set[str]:
    loops = _loops()
    found: set[str] = set()
    waiting = [number]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        folder = _SYSFS / one
        waiting += [number for number, backing in loops if backing == one]
        for entry in (*folder.glob("*/partition"), *folder.glob("holders/*/dev")):
            waiting.append((entry.parent / "dev").read_text().strip())
    return found


def _loops() -> list[tuple[str, str]]:
    """Return each loop device over another block device: its number, and that one's."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            info = os.stat(entry.read_text().rstrip("\n"))
            if stat.S_ISBLK(info.st_mode):
                backing = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
                found.append(((entry.parent.parent / "dev").read_text().strip(), backing))
        except OSError:
            continue  # detached this moment, or over a file that has been removed
    return found
