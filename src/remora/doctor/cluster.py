"""Kubernetes on this node: containerd, its snapshotters, runc, and whether it knows Remora's runtime."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from remora.doctor.report import Finding
from remora.vmm.process import find_program, first_line

AREA = "Kubernetes"
SOCKET = Path("/run/containerd/containerd.sock")
SHIM = "containerd-shim-remora-v2"
#: Oldest containerd whose shims Remora's is one of.
OLDEST = (1, 6)


def containerd() -> Iterator[Finding]:
    """Only who runs pods needs any of it, so what is missing is no more than a note."""
    binary = find_program("containerd")
    if binary is None:
        yield Finding(AREA, "containerd", "note", "not installed: no pods on this node", "apt-get install containerd")
        return
    words = first_line(binary, "--version")
    match = re.search(r"v?(\d+)\.(\d+)\.\d+", words)
    version = match[0] if match else words
    if match and (int(match[1]), int(match[2])) < OLDEST:
        yield Finding(AREA, "containerd", "bad", f"version {version} is too old", "install containerd 1.6 or newer")
    elif not SOCKET.exists():
        yield Finding(AREA, "containerd", "note", f"version {version}, not running", "systemctl start containerd")
    else:
        yield Finding(AREA, "containerd", "ok", f"version {version}")
        yield from _plugins()
    if find_program(SHIM) is None:
        yield Finding(AREA, "Remora's shim", "note", f"no {SHIM} on PATH", "run: remora node install")
    else:
        yield Finding(AREA, "Remora's shim", "ok", str(find_program(SHIM)))
    if find_program("runc") is None:
        yield Finding(
            AREA, "runc", "note", "not installed: containerd needs it for ordinary pods", "apt-get install runc"
        )


def _plugins() -> Iterator[Finding]:
    """Read `ctr plugins ls`: TYPE ID PLATFORMS STATUS."""
    ctr = find_program("ctr")
    if ctr is None:
        return
    done = subprocess.run([ctr, "plugins", "ls"], capture_output=True, text=True, check=False, timeout=10)
    rows = [line.split() for line in done.stdout.splitlines()]
    good = [row[1] for row in rows if len(row) > 2 and row[0].endswith("snapshotter.v1") and row[-1] == "ok"]
    if "overlayfs" in good:
        yield Finding(AREA, "snapshotters", "ok", ", ".join(good))
    elif good:
        yield Finding(
            AREA, "snapshotters", "note", f"{', '.join(good)}; Remora packs the layers of overlayfs", "use overlayfs"
        )
    cri = [row[-1] for row in rows if len(row) > 1 and "cri" in row[1]]
    if cri and "ok" not in cri:
        yield Finding(
            AREA, "CRI plugin", "note", "disabled: no kubelet can use this containerd", "drop it from disabled_plugins"
        )
