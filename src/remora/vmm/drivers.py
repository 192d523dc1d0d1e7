"""The drivers by name. Each is imported only when it is asked for: a start pays for one monitor, not for three."""

from __future__ import annotations

from remora.errors import InvalidArgumentError
from remora.vmm.contract import Driver
from remora.vmm.jail import Jail

#: What each monitor calls itself, by its driver's name.
TITLES = {"qemu": "QEMU", "firecracker": "Firecracker", "cloud-hypervisor": "Cloud Hypervisor"}
DEFAULT = "qemu"


def driver(name: str = DEFAULT, jail: Jail | None = None) -> Driver:
    """Return the driver of an installed monitor; with a jail it is that of one machine.

    Raises:
        InvalidArgumentError: no driver has that name, or it knows no jail.
        FailedPreconditionError: the monitor is not installed.
    """
    if jail is not None and name != "firecracker":
        raise InvalidArgumentError(f"{TITLES.get(name, name)} has no jailer", fix="use --vmm firecracker")
    if name == "qemu":
        from remora.vmm.qemu import QemuDriver

        return QemuDriver()
    if name == "firecracker":
        from remora.vmm.firecracker import FirecrackerDriver

        return FirecrackerDriver(str(jail.binary) if jail is not None else None, jail=jail)
    if name == "cloud-hypervisor":
        from remora.vmm.cloud_hypervisor import CloudHypervisorDriver

        return CloudHypervisorDriver()
    raise InvalidArgumentError(f"no virtual machine monitor is called '{name}'", fix=f"use {', '.join(TITLES)}")
