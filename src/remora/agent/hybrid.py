"""Listening beside the hybrid socket of a microVM that somebody else runs.

Firecracker, Cloud Hypervisor and Dragonball pass a guest's connection to port P on to `<their socket>_P`. That file
goes into a directory which may belong to the monitor's user, who is not trusted: the directory is opened once, without
following a symlink anywhere on the way, and every file in it is named from there. That also carries paths which are
longer than a socket address may be, as those of Kata's jailed Firecracker are.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from remora.agent.addresses import MAX_SOCKET_PATH, Address
from remora.agent.inherited import Inherited
from remora.agent.listeners import SocketFile, listen_unix
from remora.agent.peer_process import has_ended, hold_peer, peer_pid, process_id
from remora.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

#: Only the monitor's user may connect.
_MODE = 0o600
_MORE_FILES = "raise the agent's limit of open files (LimitNOFILE=)"
#: What `/proc/self/fd/<number>/` takes of an address.
_LONGEST_NAME = MAX_SOCKET_PATH - len("/proc/self/fd/2147483647/")


def open_directory(path: Path) -> int:
    """Return a descriptor (O_PATH) of a directory that is reached without a symlink, and that nobody can exchange but
    root, the agent's user and its own owner.

    Raises:
        InvalidArgumentError: it is not there, or a part of its path is a symlink or no directory.
        PermissionDeniedError: others could put another directory in its place.
        ResourceExhaustedError: the agent has no descriptor left.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    above: list[os.stat_result] = []
    fd = -1
    try:
        fd = os.open("/", flags)
        for part in path.parts[1:]:
            if part == "..":
                raise InvalidArgumentError(f"the path {path} has '..' in it", fix="give the real path")
            above.append(os.fstat(fd))
            following = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = following
        _check_above(path, above, os.fstat(fd).st_uid)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ResourceExhaustedError(f"{path} cannot be opened: {error.strerror}", fix=_MORE_FILES) from error
            raise InvalidArgumentError(
                f"{path} is not a plain directory: {error.strerror}",
                fix="symlinks are not followed: give the real path",
            ) from error
        raise
    return fd


def _check_above(path: Path, above: list[os.stat_result], owner: int) -> None:
    for part, found in zip(reversed(path.parents), above, strict=True):
        open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if open_to_all or found.st_uid not in (0, os.geteuid(), owner):
            raise PermissionDeniedError(
                f"others than root and uid {owner} may change {part}, so the path {path} is nobody's for sure",
                fix=f"chown root {part}; chmod o-w {part}",
            )


class HybridSocket:
    """The place of one monitor's socket. Owns a descriptor of the directory; `close` when its listeners are closed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InvalidArgumentError: the directory is not there, or reached by a symlink; or the name is too long.
            PermissionDeniedError: everyone may write to it, or it is another user's than the monitor's and root.
        """
        self.path = path
        if len(os.fsencode(path.name)) + len("_65535") > _LONGEST_NAME:
            raise InvalidArgumentError(
                f"the socket's name {path.name[:60]!r}... is longer than {_LONGEST_NAME - 6} bytes",
                fix="give the microVM's vsock a shorter name",
            )
        self._directory = open_directory(path.parent)
        found = os.fstat(self._directory)
        #: Device and inode of the directory.
        self.place = found.st_dev, found.st_ino
        #: The monitor's user: whose its socket is, or the directory before there is one.
        self.owner = found.st_uid
        #: The monitor's socket, the process that listens on it, and a pidfd that holds its number.
        self._listener: tuple[tuple[int, int], int, int] | None = None
        monitors = self._monitors_socket()
        if monitors is not None:
            self.owner = monitors.st_uid
        refusal = ""
        if found.st_mode & stat.S_IWOTH:
            refusal, fix = f"everyone may write to {path.parent}", f"chmod o-w {path.parent}"
        elif found.st_uid not in (0, os.geteuid(), self.owner):
            refusal = f"{path.parent} belongs to uid {found.st_uid}, and its microVM runs as uid {self.owner}"
            fix = f"chown {self.owner} {path.parent}"
        if refusal:
            self.close()
            raise PermissionDeniedError(refusal, fix=fix)

    def _monitors_socket(self) -> os.stat_result | None:
        try:
            found = os.stat(self.path.name, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return None
        return found if stat.S_ISSOCK(found.st_mode) else None

    def has(self, port: int) -> bool:
        """True if the agent's socket for a port is in the directory."""
        try:
            found = os.stat(f"{self.path.name}_{port}", dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISSOCK(found.st_mode)

    def listen(self, port: int, inherited: Inherited) -> tuple[socket.socket, SocketFile, str]:
        """Return a socket that takes guests' connections to a port, its file, and its address for a successor.

        Raises:
            AlreadyExistsError: somebody else listens there, or the name is taken by something else.
            PermissionDeniedError, FailedPreconditionError: it cannot be made.
        """
        name = f"{self.path.name}_{port}"
        address = Address(f"unix://{self.path.parent / name}", path=self.path.parent / name)
        sock = inherited.take(address)
        if sock is None:
            sock = self._bind(name, self.path.parent / name)
        try:
            return sock, SocketFile(Path(name), self._directory), address.text
        except OSError:
            sock.close()
            raise

    def _named(self, name: str) -> str:
        return f"/proc/self/fd/{self._directory}/{name}"

    def _bind(self, name: str, shown: Path) -> socket.socket:
        self._remove_stale(name, shown)
        sock = listen_unix(self._named(name), _MODE, shown)
        try:
            self._give_to_owner(name, shown)
        except BaseException:
            sock.close()
            raise
        return sock

    def _remove_stale(self, name: str, shown: Path) -> None:
        """Remove the socket file that a killed agent has left: a socket that nobody listens on, and ours."""
        try:
            found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (os.geteuid(), self.owner):
            raise AlreadyExistsError(
                f"{shown} exists and is not a socket of the agent's", fix="remove it, if nobody needs it"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self._named(name))
            except ConnectionRefusedError:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._directory)
                return
            except OSError:
                pass  # it may be alive
        raise AlreadyExistsError(f"another process listens on {shown}", fix="stop it: one agent serves a sandbox")

    def _give_to_owner(self, name: str, shown: Path) -> None:
        """Let the directory's owner connect: the monitor runs as that user. No other file can be given away so."""
        if self.owner == os.geteuid():
            return
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            found = os.fstat(fd)
            # Its owner may have put another file, or a second name of one, in its place a moment ago.
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                raise FailedPreconditionError(
                    f"{shown} was replaced while it was made", fix="see who uses the directory"
                )
            os.chown(f"/proc/self/fd/{fd}", self.owner, -1)
        except PermissionError as error:
            raise PermissionDeniedError(
                f"{shown} cannot be given to uid {self.owner}, whose the directory is", fix="run the agent as root"
            ) from error
        finally:
            os.close(fd)

    def check_peer(self, sock: socket.socket) -> None:
        """Make sure that a connection comes from the process that listens on the hybrid socket: the sandbox's monitor.

        Raises:
            UnauthenticatedError: it does not, or that cannot be known.
            UnavailableError: the monitor has too many connections waiting to be asked.
        """
        pid = peer_pid(sock)
        if pid == 0:
            raise UnauthenticatedError(
                "the monitor is a process that the agent cannot see",
                fix="run the agent in the host's process namespace (hostPID: true)",
            )
        monitor = self._monitor()
        if pid != monitor:
            raise UnauthenticatedError(
                f"process {pid} is not the monitor that listens on {self.path}",
                fix="connect from within the microVM",
            )

    def _monitor(self) -> int:
        """Return the process that listens on the monitor's socket: the kernel remembers who did (unix(7))."""
        found = self._monitors_socket()
        if found is None:
            raise UnauthenticatedError(
                f"there is no monitor's socket {self.path}", fix="connect from within the microVM"
            )
        key = found.st_dev, found.st_ino
        if self._listener is not None:
            if self._listener[0] == key and not has_ended(self._listener[2]):
                return self._listener[1]
            self._forget_monitor()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self._named(self.path.name))
            except BlockingIOError as error:
                raise UnavailableError(f"{self.path} takes no connections now", fix="try again") from error
            except OSError as error:
                raise UnauthenticatedError(
                    f"no monitor listens on {self.path}: {error.strerror}", fix="connect from within the microVM"
                ) from error
            try:
                pidfd = hold_peer(probe)
            except UnauthenticatedError as error:
                raise UnauthenticatedError(
                    f"the monitor that listened on {self.path} has ended", fix="connect from within the microVM"
                ) from error
        pid = process_id(pidfd)
        self._listener = key, pid, pidfd
        return pid

    def _forget_monitor(self) -> None:
        if self._listener is not None:
            os.close(self._listener[2])
            self._listener = None

    def close(self) -> None:
        self._forget_monitor()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
