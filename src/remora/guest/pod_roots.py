"""Roots and volumes of a pod's containers: layers from disks that containers may share, one writable place for all.

The writable place is the scratch disk, or memory where there is none. Everything has a directory of its own there, so
that removing a container gives its space back.
"""

from __future__ import annotations

import os

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.guest import rootfs, system
from remora.guest.devices import Devices
from remora.guest.rootfs import BASE
from remora.wire.guest_pod_v1 import VOLUMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Tuple

    from remora.wire.guest_pod_v1 import CreateRequest, Volume

_CONTAINERS = f"{BASE}/containers"
_LAYERS = f"{BASE}/layers"
_SCRATCH = f"{BASE}/scratch"


def bundle(container: str) -> str:
    return f"{_CONTAINERS}/{container}"


class Roots:
    def __init__(self) -> None:
        #: Containers by the serial of a disk that they use.
        self._users: Dict[str, List[str]] = {}
        #: Mount points of a container, to be taken down in reverse.
        self._mounts: Dict[str, List[str]] = {}
        self._devices = Devices()

    def configure(self, scratch: str) -> None:
        """Mount the writable place."""
        for folder in (_CONTAINERS, _LAYERS, _SCRATCH, VOLUMES):
            os.makedirs(folder, exist_ok=True)
        if scratch:
            device = system.disks().get(scratch)
            if device is None:
                raise FailedPreconditionError(f"the scratch disk {scratch!r} is not attached")
            rootfs.mount_or_explain("ext4", device, _SCRATCH, "rw,noatime")
        else:
            size = rootfs.memory_bytes()["MemTotal"] // 2
            rootfs.mount_or_explain("tmpfs", "scratch", _SCRATCH, f"size={size},mode=755")
        os.makedirs(f"{_SCRATCH}/containers", exist_ok=True)
        os.makedirs(f"{_SCRATCH}/volumes", exist_ok=True)

    def mount(self, request: CreateRequest) -> None:
        """Mount a container's root and write its bundle."""
        name = request.id
        folder = bundle(name)
        writable = f"{_SCRATCH}/containers/{name}"
        for path in (f"{folder}/rootfs", f"{writable}/upper", f"{writable}/work"):
            os.makedirs(path, exist_ok=True)
        mounts = self._mounts[name] = []
        disks = system.disks()
        self._devices.use(name, request.devices)
        lower = [self._use(name, serial, disks) for serial in request.layers]
        for volume in request.volumes:
            self._volume(name, volume, disks)
        if not lower:
            lower = [f"{writable}/empty"]
            os.makedirs(lower[0], exist_ok=True)
        # overlayfs wants the topmost layer first. Volatile: nothing here outlives the microVM.
        options = f"lowerdir={':'.join(reversed(lower))},upperdir={writable}/upper,workdir={writable}/work,volatile"
        rootfs.mount_or_explain("overlay", "root", f"{folder}/rootfs", options)
        mounts.append(f"{folder}/rootfs")
        system.write_text(f"{folder}/config.json", bytes(request.config).decode())

    def attach(self, serial: str, size_bytes: int) -> Tuple[int, int]:
        """Return the numbers of a disk that is to be a container's device."""
        return self._devices.attach(serial, size_bytes)

    def _use(self, container: str, serial: str, disks: Dict[str, str], target: str = "", readonly: bool = True) -> str:
        target = target or f"{_LAYERS}/{serial}"
        users = self._users.setdefault(serial, [])
        if not users:
            self._devices.restore(serial)
            rootfs.mount_disk(disks, serial, target, rootfs.file_system(disks.get(serial, "")), readonly)
        if container not in users:
            users.append(container)
        return target

    def _volume(self, container: str, volume: Volume, disks: Dict[str, str]) -> None:
        if "/" in volume.name or volume.name in ("", ".", ".."):
            raise InvalidArgumentError(f"a volume cannot be called {volume.name!r}")
        place = f"{VOLUMES}/{volume.name}"
        if volume.kind == "disk":
            self._use(container, volume.serial, disks, place, readonly=volume.serial.startswith("r"))
            return
        if os.path.lexists(place):
            return  # another container of the pod has brought it
        if volume.kind == "tmpfs":
            os.mkdir(place)
            size = f",size={volume.size_bytes}" if volume.size_bytes else ""
            rootfs.mount_or_explain("tmpfs", volume.name, place, f"mode={volume.mode:o}{size}")
        elif volume.kind == "dir":
            target = f"{_SCRATCH}/volumes/{volume.name}"
            os.makedirs(target, exist_ok=True)
            os.mkdir(place)
            system.run([system.BUSYBOX, "mount", "--bind", target, place])
        else:
            raise InvalidArgumentError(f"volume kind {volume.kind!r} is none of: dir, tmpfs, disk")
        os.chown(place, 0, volume.gid)
        os.chmod(place, volume.mode)

    def unmount(self, container: str) -> None:
        """Take a container's root down, and let go of disks that nobody else uses."""
        for place in reversed(self._mounts.pop(container, [])):
            system.unmount(place)
        for serial, users in list(self._users.items()):
            if container in users:
                users.remove(container)
            if not users:
                del self._users[serial]
                system.unmount(f"{_LAYERS}/{serial}")
        system.remove_tree(f"{_SCRATCH}/containers/{container}")
        system.remove_tree(bundle(container))
        self._devices.let_go(container)
