"""Disks that are devices of containers: in their true size, and let go of before the host takes them away.

A slot is seen in the size that it had when its driver looked, at boot; a read-only disk is never told of a change
(vmm/qemu.py). So the driver is bound anew whenever such a disk gets another medium.
"""

from __future__ import annotations

import errno
import os
import time

from remora.errors import FailedPreconditionError
from remora.guest import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Set, Tuple

_DRIVER = "/sys/bus/virtio/drivers/virtio_blk"
#: A file system that a privileged container has mounted goes a little later than its processes.
_FREE_S = 2.0
_SECTOR_BYTES = 512


class Devices:
    def __init__(self) -> None:
        #: Serials by container.
        self._used: Dict[str, List[str]] = {}
        #: Disks whose size is not the slot's.
        self._sized: Set[str] = set()

    def attach(self, serial: str, size_bytes: int) -> Tuple[int, int]:
        """Return major and minor number of a disk's device.

        Raises:
            FailedPreconditionError: there is no such disk, or it has another size.
        """
        if not self._in_use(serial):
            self._sized.add(serial)
            _bind_anew(serial)
        device = _device(serial)
        seen = int(system.read_text(f"/sys/block/{os.path.basename(device)}/size")) * _SECTOR_BYTES
        if seen != size_bytes:
            raise FailedPreconditionError(f"the disk {serial!r} has {seen} bytes in the guest and {size_bytes} outside")
        number = os.stat(device).st_rdev
        return os.major(number), os.minor(number)

    def use(self, container: str, serials: List[str]) -> None:
        if serials:
            self._used[container] = list(serials)

    def restore(self, serial: str) -> None:
        """Have a disk seen as it is now, if it was a device before."""
        if serial in self._sized:
            self._sized.discard(serial)
            _bind_anew(serial)

    def let_go(self, container: str) -> None:
        """Return when nothing in the guest holds the container's devices, unless others use them."""
        for serial in self._used.pop(container, []):
            if not self._in_use(serial):
                _wait_until_free(_device(serial))

    def _in_use(self, serial: str) -> bool:
        return any(serial in serials for serials in self._used.values())


def _device(serial: str) -> str:
    device = system.disks().get(serial)
    if device is None:
        raise FailedPreconditionError(f"no disk with serial {serial!r} is attached")
    return device


def _bind_anew(serial: str) -> None:
    name = os.path.basename(_device(serial))
    virtio = os.path.basename(os.path.realpath(f"/sys/block/{name}/device"))
    for action in ("unbind", "bind"):
        system.write_text(f"{_DRIVER}/{action}", virtio)


def _wait_until_free(device: str) -> None:
    deadline_s = time.monotonic() + _FREE_S
    while True:
        try:
            # What was written is written back by the last close; this also sees to what a mount has left.
            fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                return
            system.pause_s(0.01)
        else:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            return
