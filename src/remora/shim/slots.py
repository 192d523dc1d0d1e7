"""Which disk of the microVM holds what: layers and snapshots of the pod's containers, and block devices of the host.

A medium goes into a free slot when the first container asks for it and out of it when the last one that did is gone.
Who uses what is counted here and not in the guest, whose word would be of no use once it is broken.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from remora.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from remora.shim.devices import BlockDevice
from remora.vmm.contract import Slot, SlottedMachine
from remora.vmm.qemu import MAX_DEVICES

#: For layers, snapshots and read-only devices.
READ_ONLY = 15
#: For devices that may be written, as far as the machine has room beside its network cards.
MAX_WRITABLE = 4


class Medium(NamedTuple):
    #: An image's path, or a device's `major:minor`.
    name: str
    #: Of a device; -1: not known yet.
    size_bytes: int = -1


class Slots:
    def __init__(self, machine: Callable[[], SlottedMachine | None], others: int) -> None:
        """Args:
        machine: returns what runs now; None once it has ended.
        others: devices that the machine has besides.
        """
        self._machine = machine
        self._lock = threading.Lock()
        writable = min(MAX_WRITABLE, MAX_DEVICES - READ_ONLY - others)
        names = [*(f"r{number:02}" for number in range(READ_ONLY)), *(f"w{number:02}" for number in range(writable))]
        self._media: dict[str, Medium | None] = dict.fromkeys(names)
        self._users: dict[str, set[str]] = {}

    @property
    def spec(self) -> tuple[Slot, ...]:
        return tuple(Slot(serial, readonly=_is_readonly(serial)) for serial in self._media)

    def insert(self, container: str, images: list[Path]) -> list[str]:
        """Return the serials of disks with these images, put into free slots unless they are in one already.

        Raises:
            ResourceExhaustedError: the slots do not suffice.
        """
        with self._lock:
            wanted = [image for image in images if self._find(str(image)) is None]
            free = self._free(readonly=True)
            if len(wanted) > len(free):
                raise ResourceExhaustedError(
                    f"the pod's microVM has {len(free)} free disks and the container needs {len(wanted)}",
                    fix="build its image with fewer layers, or share layers between the pod's images",
                )
            for image, serial in zip(wanted, free, strict=False):
                self._running.insert(serial, image)
                self._media[serial] = Medium(str(image))
            return [self._used(container, str(image)) for image in images]

    def attach(self, container: str, device: BlockDevice) -> tuple[str, int]:
        """Return the serial of the disk that is a device of the host, and its size in bytes.

        Raises:
            RemoraError: it cannot be had; the message names it.
        """
        name = f"{device.major}:{device.minor}"
        with self._lock:
            serial = self._find(name)
            if serial is None:
                serial = self._attach(name, device)
            elif _is_readonly(serial) and device.writable:
                raise InvalidArgumentError(
                    f"the device {device.path} ({name}) is in the pod's microVM read-only, for another container",
                    fix="ask for it in the same way in all containers of the pod",
                )
            self._used(container, name)
            medium = self._media[serial]
            assert medium is not None
            return serial, medium.size_bytes

    def _attach(self, name: str, device: BlockDevice) -> str:
        free = self._free(readonly=not device.writable)
        if not free:
            kind = "writable" if device.writable else "read-only"
            raise ResourceExhaustedError(
                f"the device {device.path} ({name}): the pod's microVM has no disk left for a {kind} device",
                fix="give the pod fewer block volumes, or split it",
            )
        fd, size_bytes = device.open()
        try:
            # From here on it is open in the monitor alone, and let go of with that, however it ends.
            self._running.insert_device(free[0], fd)
        finally:
            os.close(fd)
        self._media[free[0]] = Medium(name, size_bytes)
        return free[0]

    def release(self, container: str) -> None:
        """Empty the slots of which this container was the last user; the guest has let go of them."""
        with self._lock:
            for serial, users in list(self._users.items()):
                users.discard(container)
                if users:
                    continue
                del self._users[serial]
                self._empty(serial)
            # What went in for a container that could not be made.
            for serial, medium in self._media.items():
                if medium is not None and serial not in self._users:
                    self._empty(serial)

    def _empty(self, serial: str) -> None:
        machine = self._machine()
        if machine is not None:
            machine.eject(serial)
        self._media[serial] = None

    @property
    def _running(self) -> SlottedMachine:
        machine = self._machine()
        if machine is None:
            raise UnavailableError("the pod's microVM has ended: it takes no disks")
        return machine

    def _find(self, name: str) -> str | None:
        return next(
            (serial for serial, medium in self._media.items() if medium is not None and medium.name == name), None
        )

    def _free(self, *, readonly: bool) -> list[str]:
        return [serial for serial, medium in self._media.items() if medium is None and _is_readonly(serial) == readonly]

    def _used(self, container: str, name: str) -> str:
        serial = self._find(name)
        assert serial is not None
        self._users.setdefault(serial, set()).add(container)
        return serial


def _is_readonly(serial: str) -> bool:
    return serial.startswith("r")
