"""Firecracker: starts one process per microVM, tells it over its API what to be, and jails it where a jail is given.

The guest's channel is Firecracker's own hybrid vsock: `channel.sock` in the directory that `Machine.channel_directory`
names, with one socket per port beside it for the guest's connects (its docs/vsock.md).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from remora.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from remora.vmm import firecracker_api as fc
from remora.vmm import jail as jails
from remora.vmm.api_machine import CALL_S, ApiMachine, spawn_with_console
from remora.vmm.contract import Capabilities, Driver, Machine, VmSpec
from remora.vmm.process import find_program, first_line, fork_pid_namespace

BINARY = "firecracker"
JAILER = "jailer"
_API_SOCKET = "firecracker.sock"
_CAPABILITIES = Capabilities(
    snapshot=True,
    clone=True,
    live_migration=False,
    hot_plug=False,
    emulation=False,
    channel="vsock",
    # Of 17 slots (since 1.15) the vsock, the entropy device and a balloon take three.
    max_disks=14,
)


class FirecrackerMachine(ApiMachine):
    """One Firecracker process. Not thread-safe, except that `kill` and `reap` may come from another thread."""

    def __init__(
        self,
        pid: int,
        console: socket.socket,
        *,
        api_path: Path,
        spec: VmSpec,
        version: fc.Version,
        directory: Path,
        files: fc.Files,
        jail: jails.Jail | None,
    ) -> None:
        super().__init__(pid, console, api_path=api_path, monitor="Firecracker", spec=spec)
        self._version = version
        self._files = files
        self._jail = jail
        self._directory = directory

    @property
    def channel_directory(self) -> Path:
        return self._directory if self._jail is None else self._jail.root

    def connect(self, timeout_s: float) -> None:
        self._api.wait(timeout_s, self.reap)
        if not self._spec.incoming:
            for request in fc.boot_requests(self._spec, self._version, self._files):
                self._api.send(request, timeout_s=CALL_S)

    def pause(self) -> None:
        fc.check_pause(self._version)
        self._api.send(fc.pause())

    def resume(self) -> None:
        self._api.send(fc.resume())

    def save(self, state: Path, timeout_s: float) -> None:
        memory = self._new_state(state)
        if self._jail is None:
            written = (state, memory)
            names = (str(state), str(memory))
        else:
            written = (self._jail.root / "state", self._jail.root / "memory")
            names = ("/state", "/memory")
        for request in fc.save_requests(self._version, state=names[0], memory=names[1]):
            self._api.send(request, timeout_s=timeout_s)
        for source, target in zip(written, (state, memory), strict=True):
            _keep(source, target)

    def restore(self, state: Path, timeout_s: float) -> None:
        memory = self._memory_file()
        names = (str(state), str(memory))
        if self._jail is not None:
            names = (jails.place(self._jail, state, "state"), jails.place(self._jail, memory, "memory"))
        taps = [network.tap for network in self._spec.networks]
        for request in fc.restore_requests(self._version, state=names[0], memory=names[1], taps=taps):
            self._api.send(request, timeout_s=timeout_s)

    def take_memory(self, amount_mib: int) -> None:
        """Have the guest's balloon hold `amount_mib`; needs `reclaim`."""
        self._api.send(fc.balloon_request(amount_mib, self._version))

    def _wait(self, options: int) -> None:
        super()._wait(options)
        if self._jail is not None and self._ended is not None:
            self._ended = jails.told_by_init(self._ended)


def _files(spec: VmSpec, directory: Path) -> fc.Files:
    """Return the machine's files as the process sees them.

    A saved state names the disks as they were named here, and a clone's are elsewhere (a template moves once it is
    whole). So they are called by links in the process's own directory.
    """
    names = []
    for number, disk in enumerate(spec.disks):
        link = directory / f"d{number}"
        link.unlink(missing_ok=True)
        link.symlink_to(disk.path.absolute())
        names.append(link.name)
    return fc.Files(str(spec.kernel), str(spec.initrd), tuple(names))


def _jailed_files(spec: VmSpec, jail: jails.Jail) -> fc.Files:
    """Put the machine's files into the jail; return them as the process sees them."""
    return fc.Files(
        jails.place(jail, spec.kernel, "kernel"),
        jails.place(jail, spec.initrd, "initrd"),
        tuple(
            jails.place(jail, disk.path, f"d{number}", writable=not disk.readonly)
            for number, disk in enumerate(spec.disks)
        ),
    )


def _keep(source: Path, target: Path) -> None:
    """Move what a jail wrote to where it belongs, and have it on disk before anybody counts on it.

    The jail's directory is the monitor's own, so what lies there may be a link to a file of the host: it is held open
    as what it is before anything is done with it.

    Raises:
        UnavailableError: it is no file of the monitor's.
    """
    fd = _open_plain(source)
    try:
        if source != target:
            try:
                os.rename(source, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                copy = _copied(fd, target)
                os.close(fd)
                fd = copy
                source.unlink()
            found, moved = os.fstat(fd), target.lstat()
            if (found.st_dev, found.st_ino) != (moved.st_dev, moved.st_ino):
                target.unlink()
                raise UnavailableError(f"the monitor put another file in place of {source.name} while it was taken")
            os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, 0o600)
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_plain(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(f"the monitor's {path.name} cannot be opened: {error.strerror}") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        os.close(fd)
        raise UnavailableError(f"the monitor's {path.name} is not a file of its own")
    return fd


def _copied(source_fd: int, target: Path) -> int:
    """Copy to a file of ours; returns that, open."""
    import shutil

    with open(os.dup(source_fd), "rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        return os.dup(copy.fileno())


class FirecrackerDriver:
    """Starts microVMs with the Firecracker that is installed.

    Args:
        binary: Its path; None: the one on PATH.
        jail: Where to lock its process in, for a driver of one machine; its directory is left for `jail.remove`.
            None: as the caller's user, with Firecracker's own seccomp filter only.
    """

    name = "firecracker"
    capabilities = _CAPABILITIES

    def __init__(self, binary: str | None = None, *, jail: jails.Jail | None = None, jailer: str | None = None) -> None:
        found = binary or find_program(BINARY)
        if found is None:
            raise FailedPreconditionError(
                "firecracker is not installed", fix="put a release of Firecracker on PATH, or use QEMU: --vmm qemu"
            )
        self.binary = found
        self._jail = jail
        self._jailer = jailer or find_program(JAILER) or ""
        if jail is not None and not self._jailer:
            raise FailedPreconditionError(
                "Firecracker's jailer is not installed",
                fix="put the jailer of the same release on PATH, beside firecracker",
            )
        self._version: fc.Version | None = None

    @property
    def version(self) -> str:
        return str(self.release)

    @property
    def release(self) -> fc.Version:
        """The version, comparable."""
        if self._version is None:
            self._version = fc.parse_version(first_line(self.binary, "--version"))
        return self._version

    def check(self, spec: VmSpec) -> None:
        fc.check(spec, self.release)

    def start(
        self, spec: VmSpec, *, directory: Path, channel_fd: int | None = None, keep_fds: tuple[int, ...] = ()
    ) -> FirecrackerMachine:
        if channel_fd is not None:
            raise InvalidArgumentError("Firecracker serves the guest's channel itself and takes no socket for it")
        self.check(spec)
        jail = self._jail
        if jail is None:
            socket_path = directory / _API_SOCKET
            # Left by a process that was killed; Firecracker refuses to listen on a file that exists.
            for stale in (socket_path, directory / "channel.sock"):
                stale.unlink(missing_ok=True)
            files = _files(spec, directory)
            arguments = (self.binary, "--api-sock", _API_SOCKET, "--id", _id(directory.name))
            pid, console = spawn_with_console(arguments, keep_fds=keep_fds, directory=directory)
        else:
            socket_path = jail.root / jails.API_SOCKET
            jails.prepare(jail)
            files = _jailed_files(spec, jail)
            pid, console = spawn_with_console(
                (*jails.INIT, *jails.command_line(jail, self._jailer)),
                keep_fds=keep_fds,
                directory=directory,
                fork=fork_pid_namespace,
                # A tap is in the caller's namespace.
                network=bool(spec.networks) or jail.netns is not None,
            )
        return FirecrackerMachine(
            pid,
            console,
            api_path=socket_path,
            spec=spec,
            version=self.release,
            directory=directory,
            files=files,
            jail=jail,
        )


def _id(name: str) -> str:
    """Return a sandbox's name as an instance's: 1 to 64 letters, digits and hyphens."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:64] or "microvm"


def _conforms(machine: FirecrackerMachine, driver: FirecrackerDriver) -> tuple[Machine, Driver]:
    """mypy proves here that the classes fulfil the contract."""
    return machine, driver
