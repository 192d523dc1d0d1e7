"""Virtual machines: which monitors are here, whether KVM boots a guest, and what carries the guest's channel."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from remora import paths
from remora.doctor.report import Finding, State
from remora.errors import RemoraError
from remora.vmm.drivers import TITLES, driver
from remora.vmm.probe import boots
from remora.vmm.process import find_program

AREA = "microVMs"


def monitors() -> Iterator[Finding]:
    """Each monitor with its version. QEMU is the one that works everywhere; the others are a choice."""
    for name, title in TITLES.items():
        try:
            version = driver(name).version
        except RemoraError as error:
            state: State = "bad" if name == "qemu" else "note"
            yield Finding(AREA, title, state, error.message, error.fix or "")
            continue
        yield Finding(AREA, title, "ok", f"version {version}")
    if find_program("firecracker") and not find_program("jailer"):
        yield Finding(AREA, "jailer", "note", "not installed", "put the jailer of the same Firecracker release on PATH")


def acceleration() -> Iterator[Finding]:
    """Whether a guest boots with KVM: a device node alone proves nothing (vmm/probe.py)."""
    emulation = "guests are emulated (TCG): right, and about ten times slower"
    node = Path("/dev/kvm")
    if not node.exists():
        yield Finding(
            AREA,
            "KVM",
            "note",
            f"no /dev/kvm; {emulation}",
            "enable virtualisation in the firmware or the cloud's VM type",
        )
        return
    if not os.access(node, os.R_OK | os.W_OK):
        yield Finding(
            AREA, "KVM", "note", f"/dev/kvm may not be used by this user; {emulation}", "add the user to the group kvm"
        )
        return
    kernel = guest_kernel()
    if kernel is None:
        yield Finding(AREA, "KVM", "note", "not tried: there is no guest kernel yet", "run: remora image guest")
    elif find_program("qemu-system-x86_64") is None:
        yield Finding(AREA, "KVM", "note", "not tried: QEMU is needed for it", "apt-get install qemu-system-x86")
    elif boots(kernel, "kvm"):
        yield Finding(AREA, "KVM", "ok", "a guest booted with it")
    else:
        yield Finding(
            AREA,
            "KVM",
            "note",
            f"/dev/kvm is there, but no guest boots with it (a software KVM); {emulation}",
            "use a host whose processor offers virtualisation",
        )


def guest_kernel() -> Path | None:
    """Return the kernel of the guest OS image; None if none was built."""
    try:
        note = json.loads((paths.state_dir() / "guest" / "current.json").read_text())
        kernel = Path(note["kernel"])
    except (OSError, ValueError, KeyError):
        return None
    return kernel if kernel.is_file() else None


def guest_image() -> Iterator[Finding]:
    """Whether there is a guest OS image to boot."""
    kernel = guest_kernel()
    if kernel is None:
        yield Finding(
            AREA, "guest OS image", "note", "not built; the first microVM builds it", "run: remora image guest"
        )
    else:
        yield Finding(AREA, "guest OS image", "ok", str(kernel.parent))


def channels() -> Iterator[Finding]:
    """How guests are reached: Remora needs none of the kernel's vsock, Kata's QEMU sandboxes do."""
    if _is_character_device("/dev/vhost-vsock"):
        yield Finding(AREA, "vhost-vsock", "ok", "guests of QEMU under Kata can be reached")
    else:
        yield Finding(
            AREA,
            "vhost-vsock",
            "note",
            "no /dev/vhost-vsock; only Kata's QEMU sandboxes need it, Remora's own use virtio-serial",
            "modprobe vhost_vsock",
        )
    if not _is_character_device("/dev/net/tun"):
        yield Finding(AREA, "tap devices", "note", "no /dev/net/tun: pods get no network", "modprobe tun")
    else:
        yield Finding(AREA, "tap devices", "ok", "/dev/net/tun")


def _is_character_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False
