"""Firecracker's jailer: its command line, and the directory that it makes into the monitor's root.

The jailer runs as root, builds `<base>/<name of the binary>/<id>/root`, and starts Firecracker in it as an unprivileged
user with nothing else in sight (its docs/jailer.md). Everything that the machine needs must lie in that root: it is
linked there where the file system allows, else copied.
"""

from __future__ import annotations

import errno
import os
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

    A file that only the jail writes is given to its user: a copy where the file has a name elsewhere, since owner and
    content of a linked one change under every name. One that is read stays whose it is, and must be readable.
    """
    target = jail.root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if writable and source.stat().st_nlink:
            raise OSError(errno.EMLINK, "it has a name of its own")
        _link(source, target)
    except OSError:
        _copy(source, target)
        os.chmod(target, 0o440)
        os.chown(target, 0, jail.gid)
    if writable:
        os.chmod(target, 0o600)
        os.chown(target, jail.uid, jail.gid, follow_symlinks=False)
    return f"/{name}"


def _link(source: Path, target: Path) -> None:
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A file without a name is linked through /proc/self/fd, which must be followed; without a descriptor of a
        # directory Python calls link(2), which does not follow.
        os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a file and leave its holes: a disk of 10 GB has little in it."""
    with source.open("rb") as original, target.open("xb") as copy:
        os.ftruncate(copy.fileno(), size := os.fstat(original.fileno()).st_size)
        begin = 0
        while begin < size:
            try:
                begin = os.lseek(original.fileno(), begin, os.SEEK_DATA)
            except OSError:
                return  # nothing but a hole to the end
            end = os.lseek(original.fileno(), begin, os.SEEK_HOLE)
            os.lseek(copy.fileno(), begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(copy.fileno(), original.fileno(), begin, end - begin)
