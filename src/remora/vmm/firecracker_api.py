"""What Firecracker is told, as pure functions: one machine, one version, the requests in their order.

Firecracker rejects fields that it does not know, and its API changed under the same names, so each version gets what it
understands: from v0.23.1 (2020, what Kata's oldest releases drive) on. Field names and the versions that brought or
dropped them are those of its CHANGELOG and src/firecracker/swagger/firecracker.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from remora.errors import FailedPreconditionError, InvalidArgumentError
from remora.vmm.api import Request
from remora.vmm.api_machine import limiter
from remora.vmm.contract import Network, VmSpec

#: The guest's address on its vsock. Private to each monitor, so clones may share it; 0 to 2 are taken (vsock(7)).
GUEST_CID = 3
#: Firecracker's own limit (MachineConfiguration.vcpu_count).
MAX_CPUS = 32
#: Firecracker tells the guest its end by the keyboard controller; what it does not emulate need not be probed
#: (src/vmm/src/vmm_config/boot_source.rs, DEFAULT_KERNEL_CMDLINE). A later `reboot=` replaces an earlier one.
_ARGUMENTS = "reboot=k i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"


class Version(NamedTuple):
    """A release, comparable."""

    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


#: Oldest release whose requests are known here.
OLDEST = Version(0, 23, 1)
_BALLOON = Version(0, 24)
_RESETS_VSOCK = Version(0, 25)
#: `smt` for `ht_enabled`, no `vsock_id`, no type of MMDS per interface.
_MODERN = Version(1, 0)
_MEMORY_BACKEND = Version(1, 1)
_ENTROPY = Version(1, 4)
_PAGE_REPORTING = Version(1, 14)
#: At most 11 devices before.
_MANY_DEVICES = Version(0, 24)
_MTU = Version(1, 16)
_VSOCK_OVERRIDE = Version(1, 16)
#: 1.16.0 loses a restored guest's connects to the host (its issue 5969).
_BAD_RESTORE = (Version(1, 16), Version(1, 16, 1))
#: After a pause without a snapshot the host's bytes no longer reach the guest (issue 6074).
_BAD_RESUME = (Version(1, 16), Version(1, 16, 2))


class Files(NamedTuple):
    """The machine's files by the names under which Firecracker sees them (in a jail: from its root)."""

    kernel: str
    initrd: str
    disks: tuple[str, ...]
    #: Where it serves the guest's channel. Relative, so that each clone has its own beside it.
    channel: str = "channel.sock"


def parse_version(text: str) -> Version:
    """Read what `firecracker --version` prints, or the `vmm_version` of `GET /`.

    Raises:
        FailedPreconditionError: no version in it, or one older than is known here.
    """
    match = re.search(r"v?(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise FailedPreconditionError(
            f"Firecracker does not tell its version: {text.strip()[:80]!r}", fix="reinstall Firecracker"
        )
    version = Version(*map(int, match.groups()))
    if version < OLDEST:
        raise FailedPreconditionError(
            f"Firecracker {version} is too old", fix=f"install {OLDEST} or newer; 1.16.1 or newer is best"
        )
    return version


def check(spec: VmSpec, version: Version) -> None:
    """Refuse what this release cannot hold.

    Raises:
        InvalidArgumentError: with the bound that is broken.
    """
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise InvalidArgumentError(
            f"{spec.cpus} CPUs were asked for", fix=f"Firecracker gives a microVM 1 to {MAX_CPUS}"
        )
    if spec.accelerator != "kvm":
        raise FailedPreconditionError(
            "Firecracker needs KVM, and no guest boots with it on this host",
            fix="use QEMU, which can emulate: --vmm qemu (`remora doctor` says more)",
        )
    # The vsock takes one slot, a balloon and the entropy device one each (docs: 17 slots on x86 since 1.15, 19 before).
    slots = 17 if version >= (1, 15, 0) else 19 if version >= _MANY_DEVICES else 11
    needed = len(spec.disks) + len(spec.networks) + 1 + spec.reclaim + (version >= _ENTROPY)
    if needed > slots:
        raise InvalidArgumentError(
            f"the microVM needs {needed} devices and Firecracker {version} takes {slots}",
            fix="build the image with fewer layers",
        )


def boot_requests(spec: VmSpec, version: Version, files: Files) -> tuple[Request, ...]:
    """Return the calls that configure a machine and start it."""
    check(spec, version)
    return (*_configuration(spec, version, files), Request("PUT", "/actions", {"action_type": "InstanceStart"}))


def config_file(spec: VmSpec, version: Version, files: Files) -> dict[str, Any]:
    """Return the same machine as a `--config-file` (docs/getting-started; src/vmm/src/resources.rs)."""
    check(spec, version)
    sections: dict[str, Any] = {"drives": [], "network-interfaces": []}
    for request in _configuration(spec, version, files):
        name = request.path.strip("/").partition("/")[0]
        if name in ("drives", "network-interfaces"):
            sections[name].append(request.body)
        else:
            sections[name] = request.body
    return sections


def _configuration(spec: VmSpec, version: Version, files: Files) -> list[Request]:
    machine: dict[str, Any] = {"vcpu_count": spec.cpus, "mem_size_mib": spec.memory_mib}
    machine["smt" if version >= _MODERN else "ht_enabled"] = False
    boot = {
        "kernel_image_path": files.kernel,
        "initrd_path": files.initrd,
        "boot_args": f"{spec.arguments} {_ARGUMENTS}",
    }
    vsock: dict[str, Any] = {"guest_cid": GUEST_CID, "uds_path": files.channel}
    if version < _MODERN:
        vsock["vsock_id"] = "channel"
    requests = [Request("PUT", "/machine-config", machine), Request("PUT", "/boot-source", boot)]
    for number, (disk, path) in enumerate(zip(spec.disks, files.disks, strict=True)):
        drive: dict[str, Any] = {
            "drive_id": f"d{number}",
            "path_on_host": path,
            "is_root_device": False,
            "is_read_only": disk.readonly,
            **limiter("rate_limiter", disk.rate),
        }
        requests.append(Request("PUT", f"/drives/d{number}", drive))
    for number, network in enumerate(spec.networks):
        requests.append(Request("PUT", f"/network-interfaces/n{number}", _interface(network, number, version)))
    requests.append(Request("PUT", "/vsock", vsock))
    if version >= _ENTROPY:
        requests.append(Request("PUT", "/entropy", {}))
    if spec.reclaim:
        if version < _PAGE_REPORTING:
            raise FailedPreconditionError(
                f"Firecracker {version} takes no memory back by itself", fix=f"install {_PAGE_REPORTING} or newer"
            )
        balloon = {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True}
        requests.append(Request("PUT", "/balloon", balloon))
    return requests


def _interface(network: Network, number: int, version: Version) -> dict[str, Any]:
    interface: dict[str, Any] = {
        "iface_id": f"n{number}",
        "host_dev_name": network.tap,
        "guest_mac": network.mac,
        # Seen from the device: what it receives is what the host sends to the guest.
        **limiter("rx_rate_limiter", network.receive),
        **limiter("tx_rate_limiter", network.send),
    }
    if version >= _MTU and network.mtu != 1500:
        interface["mtu"] = network.mtu
    return interface


def pause() -> Request:
    """Return the call that stops the virtual CPUs."""
    return Request("PATCH", "/vm", {"state": "Paused"})


def resume() -> Request:
    """Return the call that lets them go on."""
    return Request("PATCH", "/vm", {"state": "Resumed"})


def check_pause(version: Version) -> None:
    """Refuse to pause where the guest's channel would not survive it."""
    if _BAD_RESUME[0] <= version < _BAD_RESUME[1]:
        raise FailedPreconditionError(
            f"a microVM that Firecracker {version} pauses loses its channel (issue 6074)",
            fix=f"install {_BAD_RESUME[1]} or newer, or 1.15",
        )


def check_snapshot(version: Version) -> None:
    """Refuse releases whose restored guests cannot be reached.

    Raises:
        FailedPreconditionError: with the release to install.
    """
    if version < _RESETS_VSOCK or _BAD_RESTORE[0] <= version < _BAD_RESTORE[1]:
        raise FailedPreconditionError(
            f"microVMs that Firecracker {version} restores can lose their channel",
            fix=f"install Firecracker {_BAD_RESTORE[1]} or newer",
        )


def save_requests(version: Version, *, state: str, memory: str) -> tuple[Request, ...]:
    """Return the calls that write a machine's state and memory; it stays paused."""
    check_snapshot(version)
    body = {"snapshot_path": state, "mem_file_path": memory, "snapshot_type": "Full"}
    return (pause(), Request("PUT", "/snapshot/create", body))


def restore_requests(
    version: Version, *, state: str, memory: str, channel: str = "channel.sock", taps: Sequence[str] = ()
) -> tuple[Request, ...]:
    """Return the calls that load a state into a fresh process and let it run.

    The memory file is mapped privately: clones share its pages and it must not change while one lives.
    """
    check_snapshot(version)
    body: dict[str, Any] = {"snapshot_path": state}
    if version >= _MEMORY_BACKEND:
        body["mem_backend"] = {"backend_type": "File", "backend_path": memory}
    else:
        body["mem_file_path"] = memory
    if version >= _VSOCK_OVERRIDE:
        body["vsock_override"] = {"uds_path": channel}
    if taps:
        if version < (1, 12, 0):
            raise FailedPreconditionError(
                f"Firecracker {version} gives a clone no tap of its own", fix="install 1.12 or newer"
            )
        body["network_overrides"] = [{"iface_id": f"n{n}", "host_dev_name": tap} for n, tap in enumerate(taps)]
    body["resume_vm"] = True
    return (Request("PUT", "/snapshot/load", body),)


def balloon_request(amount_mib: int, version: Version) -> Request:
    """Return the call that takes `amount_mib` of memory from a running guest (0 gives all back)."""
    if version < _BALLOON:
        raise FailedPreconditionError(f"Firecracker {version} has no balloon", fix=f"install {_BALLOON} or newer")
    return Request("PATCH", "/balloon", {"amount_mib": amount_mib})
