"""Firecracker's jailer: its command line, and the directory that it makes into the monitor's root.

The jailer runs as root, builds `<base>/<name of the binary>/<id>/root`, and starts Firecracker in it as an unprivileged
user with nothing else in sight (its docs/jailer.md). Everything that the machine needs must lie in that root: it is
linked there where the file system allows, else copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

#: Where the jailed process's API socket is, from its root.
API_SOCKET = "api.sock"
#: Descriptors that it may open: each of the guest's streams takes one, 1023 at most (src/vmm/.../vsock/unix/muxer.rs).
MAX_FILES = 2048


class Jail(NamedTuple):
    """Where and as whom a monitor is locked in."""

    #: Below it the jailer makes its directories.
    base: Path
    id: str
    #: The monitor's binary; the jailer copies it into the root.
    binary: Path
    uid: int
    gid: int
    cgroup_version: int = 2
    #: The cgroup below which the jailer makes one for this monitor; empty: the default of the jailer.
    parent_cgroup: str = ""
    #: `file=value`, as `memory.max=300000000`.
    cgroups: tuple[str, ...] = ()
    #: Network namespace to enter; None: the caller's.
    netns: Path | None = None

    @property
    def root(self) -> Path:
        """What the monitor sees as `/`."""
        return self.base / self.binary.name / self.id / "root"


def command_line(jail: Jail, jailer: str, arguments: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the jailer's argument vector; `arguments` are Firecracker's own, beside the API's socket."""
    cgroups = [part for setting in jail.cgroups for part in ("--cgroup", setting)]
    return (
        jailer,
        *("--id", jail.id),
        *("--exec-file", str(jail.binary)),
        *("--uid", str(jail.uid), "--gid", str(jail.gid)),
        *("--chroot-base-dir", str(jail.base)),
        *("--cgroup-version", str(jail.cgroup_version)),
        *(("--parent-cgroup", jail.parent_cgroup) if jail.parent_cgroup else ()),
        *cgroups,
        *(("--netns", str(jail.netns)) if jail.netns is not None else ()),
        *("--resource-limit", f"no-file={MAX_FILES}"),
        "--",
        *("--api-sock", f"/{API_SOCKET}"),
        *arguments,
    )


def place(jail: Jail, source: Path, name: str, *, writable: bool = False) -> str:
    """Put a file into the root under `name`; returns its path there.

    A file that only the jail writes is given to its user; one that is read stays whose it is, and must be readable.
    """
    target = jail.root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Through /proc/self/fd: a file without a name can be linked only where the link is followed.
        os.link(source, target, follow_symlinks=True)
    except OSError:
        shutil.copyfile(source, target)
        os.chmod(target, 0o440)
        os.chown(target, 0, jail.gid)
    if writable:
        os.chown(target, jail.uid, jail.gid, follow_symlinks=False)
    return f"/{name}"
