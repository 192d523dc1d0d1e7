"""A container image for the guest's tests: busybox alone, as an erofs layer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def busybox_layer(folder: Path) -> Path:
    """Return an erofs file whose root holds busybox under its usual names, and the users root and alice."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("busybox (package busybox-static) is not installed")
    tree = folder / "busybox"
    for name in ("bin", "etc", "tmp", "home/alice"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    for name in (
        "sh",
        "cat",
        "echo",
        "sleep",
        "id",
        "stty",
        "env",
        "pwd",
        "hostname",
        "head",
        "ls",
        "true",
        "dd",
        "wc",
    ):
        (tree / "bin" / name).symlink_to("busybox")
    for name in ("nc", "md5sum", "kill", "ps", "touch", "date", "grep", "tail", "mount", "df", "printf", "mknod", "rm"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nalice:x:1000:\nvideo:x:44:alice\n")
    layer = folder / "busybox.erofs"
    subprocess.run(["mkfs.erofs", "-d0", "--all-root", str(layer), str(tree)], check=True, capture_output=True)
    return layer
