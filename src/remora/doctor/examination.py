"""Everything that `remora doctor` looks at, in its order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from remora.doctor import cluster, machines, node
from remora.doctor.report import Check, Finding


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("host", "Python", "ok", f"{version} at {sys.executable}")


CHECKS = (
    Check("Python", python),
    Check("microVM monitors", machines.monitors),
    Check("the guest OS image", machines.guest_image),
    Check("KVM, by booting a guest", machines.acceleration),
    Check("channels and networks", machines.channels),
    Check("the node agent", node.agent),
    Check("microVMs of others", node.fleets),
    Check("confinement of workers", node.confinement),
    Check("accelerators", node.accelerators),
    Check("models", node.models),
    Check("disks and tools", node.space),
    Check("containerd", cluster.containerd),
)


def examine(progress: Callable[[str], None] = lambda _title: None) -> list[Finding]:
    """Run every check. One that fails itself is a finding, not the end of the examination."""
    findings: list[Finding] = []
    for check in CHECKS:
        progress(check.title)
        try:
            findings += check.run()
        except Exception as error:  # noqa: BLE001 - whatever a strange host does to one check, the others are told
            findings.append(Finding("doctor", check.title, "note", f"could not be looked at: {error}"))
    return findings
