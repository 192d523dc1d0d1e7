"""A container image for the guest's tests: an erofs layer of names for the busybox that the guest OS disk brings."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NAMES = "sh cat dd echo sleep id stty env pwd hostname head ls true wc kill touch date grep mknod rm"


def busybox_layer(folder: Path) -> Path:
    """Return an erofs file with busybox under its usual names and the users root and alice.

    It stands on the guest OS disk as its lower layer (`GuestVm.layers`), which has busybox and Python.
    """
    tree = folder / "busybox"
    for name in ("bin", "etc", "tmp", "home/alice"):
        (tree / name).mkdir(parents=True)
    for name in _NAMES.split():
        (tree / "bin" / name).symlink_to("/usr/bin/busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nalice:x:1000:\nvideo:x:44:alice\n")
    layer = folder / "busybox.erofs"
    subprocess.run(["mkfs.erofs", "-d0", "--all-root", str(layer), str(tree)], check=True, capture_output=True)
    return layer
