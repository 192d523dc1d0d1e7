"""A container image for the guest's tests: an erofs layer of busybox alone, taken from the guest OS's own packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from remora import paths
from remora.images.guest_os import build_guest_image

_NAMES = "sh cat dd echo sleep id stty env pwd hostname head ls true wc kill touch date grep mknod rm"


def busybox_layer(folder: Path) -> Path:
    """Return an erofs file whose root holds busybox under its usual names, and the users root and alice."""
    packages = build_guest_image(paths.state_dir()).disk.parent.parent / "packages"
    unpacked, tree = folder / "unpacked", folder / "busybox"
    newest = max(packages.glob("busybox-static_*.deb"), key=lambda path: path.stat().st_mtime)
    subprocess.run(["dpkg-deb", "-x", str(newest), str(unpacked)], check=True)
    for name in ("bin", "etc", "tmp", "home/alice"):
        (tree / name).mkdir(parents=True)
    shutil.copy(next(unpacked.rglob("bin/busybox")), tree / "bin/busybox")
    for name in _NAMES.split():
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nalice:x:1000:\nvideo:x:44:alice\n")
    layer = folder / "busybox.erofs"
    subprocess.run(["mkfs.erofs", "-d0", "--all-root", str(layer), str(tree)], check=True, capture_output=True)
    return layer
