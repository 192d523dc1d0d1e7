"""The drivers by name. Each is imported only when it is asked for: a start pays for one monitor, not for three."""

from __future__ import annotations

from remora.errors import InvalidArgumentError
from remora.vmm.contract import Driver

#: What each monitor calls itself, by its driver's name.
TITLES = {"qemu": "QEMU", "firecracker": "Firecracker", "cloud-hypervisor": "Cloud Hypervisor"}
DEFAULT = "qemu"


def driver(name: str = DEFAULT) -> Driver:
    """Return the driver of an installed monitor.

    Raises:
        InvalidArgumentError: no driver has that name.
        FailedPreconditionError: the monitor is not installed.
    """
    if name == "qemu":
        from remora.vmm.qemu import QemuDriver

        return QemuDriver()
    if name == "firecracker":
        from remora.vmm.firecracker import FirecrackerDriver

        return FirecrackerDriver()
    if name == "cloud-hypervisor":
        from remora.vmm.cloud_hypervisor import CloudHypervisorDriver

        return CloudHypervisorDriver()
    raise InvalidArgumentError(f"no virtual machine monitor is called '{name}'", fix=f"use {', '.join(TITLES)}")
