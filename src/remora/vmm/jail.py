"""Firecracker's jailer: its command line, and the directory that it makes into the monitor's root.

The jailer runs as root, builds `<base>/<name of the binary>/<id>/root`, and starts Firecracker in it as an unprivileged
user with nothing else in sight (its docs/jailer.md). Everything that the machine needs must lie in that root: it is
linked there where the jailed user can read it as it is, else copied. Clearing the root and the cgroups away is left to
whoever called the jailer.

From the monitor's first moment on the root is the monitor's own, and a monitor that its guest has taken over may put
anything there. So nothing here follows a link in it, and no file gets another owner unless it has no other name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from remora.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError
from remora.vmm.channel import SOCKET_NAME
from remora.vmm.contract import Ended

#: Where the jailed process's API socket is, from its root.
API_SOCKET = "api.sock"
#: Descriptors that it may open: each of the guest's streams takes one, 1023 at most (src/vmm/.../vsock/unix/muxer.rs).
MAX_FILES = 2048
#: The cgroup below which each jail gets its own, unless the operator names another.
PARENT_CGROUP = "remora"
#: The first process of a jail's PID namespace, before the jailer's arguments. It dies with the process that started
#: it, and the kernel then kills what is in the namespace. The jailer itself could not do that: the kernel forgets the
#: signal at its parent's death when it changes its user (prctl(2)).
INIT = ("/bin/sh", "-c", '"$@"; exit $?', "remora-jail")
_MOUNTS = Path("/proc/self/mounts")
#: Signals that end a process have lower numbers, and Firecracker's own statuses begin above (src/vmm/src/lib.rs).
_HIGHEST_SIGNAL = 19
#: How long a cgroup may stay busy after its last process was reaped.
_CGROUP_S = 2.0


class Jail(NamedTuple):
    """Where and as whom a monitor is locked in."""

    #: Below it the jailer makes its directories.
    base: Path
    id: str
    #: The monitor's binary, by its real path: the jailer names a directory after it, and copies it into the root.
    binary: Path
    uid: int
    gid: int
    cgroup_version: int = 2
    #: The cgroup below which the jailer makes one for this monitor; empty: the default of the jailer.
    parent_cgroup: str = ""
    #: `file=value`, as `memory.max=300000000`.
    cgroups: tuple[str, ...] = ()
    #: Network namespace to enter; None: one with nothing in it, or the caller's where the machine has a tap.
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


def told_by_init(ended: Ended) -> Ended:
    """Return how the monitor ended, which `INIT` tells as a shell does: 128 and the signal."""
    signum = ended.status - 128
    return ended._replace(status=0, signal=signum) if 0 < signum <= _HIGHEST_SIGNAL else ended


def prepare(jail: Jail) -> None:
    """Make the root, empty but for the sockets that others have put beside the guest's channel.

    Raises:
        PermissionDeniedError: somebody else could exchange what lies in the base.
        FailedPreconditionError: its file system takes no devices or no programs.
    """
    check_base(jail.base)
    home = jail.root.parent
    while True:
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            jail.root.mkdir(mode=0o700, exist_ok=True)
            break
        except FileNotFoundError:
            continue  # another jail's end has removed the directory that they share
    root = _open_root(jail)
    try:
        # The jailer does so too, but the agent looks before that.
        os.fchown(root, jail.uid, jail.gid)
        for name in os.listdir(root):
            if not name.startswith(f"{SOCKET_NAME}_"):
                _remove(root, name)
    finally:
        os.close(root)


def check_base(base: Path) -> None:
    """Make the directory of all jails, or refuse the one that is there; raises as `prepare`."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = base.stat()
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionDeniedError(
            f"others than root may write to {base}, where the jails are",
            fix=f"chown root {base}; chmod go-w {base}; or name another directory: --jail base=DIRECTORY",
        )
    flags = os.statvfs(base).f_flag
    for flag, name, what in (
        (os.ST_NODEV, "nodev", "/dev/kvm in a jail"),
        (os.ST_NOEXEC, "noexec", "Firecracker in a jail"),
    ):
        if flags & flag:
            raise FailedPreconditionError(
                f"{base} is mounted with {name}, so {what} would not work",
                fix="name a directory of another file system: --jail base=DIRECTORY",
            )


def place(jail: Jail, source: Path, name: str, *, writable: bool = False) -> str:
    """Put a file into the root under `name`; returns its path there.

    A file that everyone may read is linked. One that only the jail writes becomes its user's: a copy where the file has
    a name elsewhere, since owner and content of a linked one change under every name.

    Raises:
        InvalidArgumentError: it is no plain file.
        ResourceExhaustedError: no space for a copy.
        FailedPreconditionError: it cannot be read, or the name is taken.
    """
    root = _open_root(jail)
    try:
        file = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(file)
            if not stat.S_ISREG(info.st_mode):
                raise InvalidArgumentError(f"{source} is no plain file, and nothing else goes into a jail")
            shared = info.st_nlink == 0 if writable else bool(info.st_mode & stat.S_IROTH)
            if shared and _link(file, root, name):
                if writable:
                    _give(file, jail.uid, jail.gid, 0o600)
            else:
                _copy(file, root, name, jail, writable=writable)
        finally:
            os.close(file)
    except OSError as error:
        what = f"{source} could not be put into the jail {jail.root}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"free some space in {jail.base}, or name another directory: --jail base=DIRECTORY"
            raise ResourceExhaustedError(what, fix=fix) from error
        raise FailedPreconditionError(what) from error
    finally:
        os.close(root)
    return f"/{name}"


def remove(jail: Jail) -> None:
    """Remove the jail's directory and its cgroups. Its processes must have ended. Harmless if nothing is there."""
    home = jail.root.parent
    with contextlib.suppress(FileNotFoundError):
        parent = os.open(home.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _remove(parent, home.name)
        finally:
            os.close(parent)
        with contextlib.suppress(OSError):
            home.parent.rmdir()  # unless other jails are in it
    for folder in cgroup_folders(jail, _MOUNTS.read_text() if jail.cgroups else ""):
        _remove_cgroup(folder)
        if jail.parent_cgroup == PARENT_CGROUP:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def cgroup_folders(jail: Jail, mounts: str) -> list[Path]:
    """Return the cgroups that the jailer makes for this jail, by the lines of /proc/mounts, as it finds them itself.

    Without a setting it makes none (docs/jailer.md).
    """
    below = Path(jail.parent_cgroup or jail.binary.name) / jail.id
    found: list[Path] = []
    controllers = {setting.partition(".")[0] for setting in jail.cgroups}
    for line in mounts.splitlines():
        _, mounted_on, kind, options, *_ = line.split()
        if jail.cgroup_version == 2:
            if kind == "cgroup2" and controllers:
                return [Path(mounted_on) / below]
        elif kind == "cgroup" and controllers & set(options.split(",")):
            found.append(Path(mounted_on) / below)
            controllers -= set(options.split(","))
    return found


def _open_root(jail: Jail) -> int:
    return os.open(jail.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _link(file: int, root: int, name: str) -> bool:
    """Give an open file a name in the root; False where it cannot have one there."""
    try:
        # With a descriptor of a directory Python calls linkat(2), which follows /proc/self/fd to the file itself.
        os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=root, follow_symlinks=True)
    except FileExistsError:
        raise
    except OSError:
        return False  # another file system, one without links, or an unlinked file that can have no name again
    return True


def _give(file: int, uid: int, gid: int, mode: int) -> None:
    """Make an open file somebody's; it must have one name."""
    if os.fstat(file).st_nlink != 1:
        raise PermissionDeniedError("a file that has another name is not given to a jail")
    os.fchmod(file, mode)
    os.fchown(file, uid, gid)


def _copy(original: int, root: int, name: str, jail: Jail, *, writable: bool) -> None:
    """Copy a file and leave its holes: a disk of 10 GB has little in it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    copy = os.open(name, flags, 0o600, dir_fd=root)
    try:
        os.ftruncate(copy, size := os.fstat(original).st_size)
        end = 0
        while end < size:
            try:
                begin = os.lseek(original, end, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole to the end
            end = os.lseek(original, begin, os.SEEK_HOLE)
            os.lseek(copy, begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(copy, original, begin, end - begin)
        _give(copy, jail.uid if writable else os.geteuid(), jail.gid, 0o600 if writable else 0o440)
    finally:
        os.close(copy)


def _remove(directory: int, name: str) -> None:
    """Remove what has this name in an open directory, with everything in it, and follow no link."""
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=directory)
            return
    except FileNotFoundError:
        return
    import shutil

    shutil.rmtree(name, dir_fd=directory)


def _remove_cgroup(folder: Path) -> None:
    deadline_s = time.monotonic() + _CGROUP_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline_s:
                return  # somebody has put a process of his own there
            time.sleep(0.01)
