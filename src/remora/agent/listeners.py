"""Listening sockets: made with care, replaced only when dead, removed at the end.

A socket file that a killed agent left behind is in the way; one that somebody listens on must stay. The two look the
same in a directory, so the file is tried first.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from remora.agent.addresses import Address, family
from remora.errors import AlreadyExistsError, FailedPreconditionError, PermissionDeniedError, RemoraError
from remora.reactor import READ, Reactor

#: Connections that wait to be accepted; the kernel lowers it to net.core.somaxconn (4096). During a handover all wait.
_BACKLOG = 4096
#: How long accepting pauses when the process has no descriptor left.
_PAUSE_S = 0.1
#: Connections accepted in one go. Others' requests come between: beside two floods of connections a ping of another
#: guest took 2.9 ms with 64, 0.6 with 8, 0.2 with 2.
_BATCH = 4


def _in_use(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it answers in some way, or it cannot be known: leave it
        return True


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AlreadyExistsError(f"{path} exists and is not a socket", fix="move it away, or listen on another address")
    if _in_use(path):
        raise AlreadyExistsError(
            f"another process listens on {path}", fix="stop it (`remora agent status`), or listen on another address"
        )
    path.unlink()


def bind_unix(path: Path, mode: int) -> socket.socket:
    """Listen on a Unix socket that has `mode` from its first moment.

    Raises:
        AlreadyExistsError: the path is taken.
        PermissionDeniedError, FailedPreconditionError: the path cannot be made.
    """
    _remove_stale(path)
    sock = listen_unix(os.fspath(path), mode, path)
    path.chmod(mode)  # whatever the umask has taken from it
    return sock


def listen_unix(name: str, mode: int, path: Path) -> socket.socket:
    """Listen on a new Unix socket by a name that leads to `path`, with `mode` less the umask.

    Raises as `bind_unix`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The file gets the socket's own mode, less the umask (unix_bind in Linux); changing the umask for a moment
        # would change it for the disk threads, too.
        os.fchmod(sock.fileno(), mode)
        sock.bind(name)
    except PermissionError as error:
        sock.close()
        raise PermissionDeniedError(
            f"no permission to make the socket {path}", fix="choose a directory you may write to, or run as its owner"
        ) from error
    except FileNotFoundError as error:
        sock.close()
        raise FailedPreconditionError(
            f"the directory of {path} does not exist", fix=f"mkdir -p {path.parent}"
        ) from error
    except OSError as error:
        sock.close()
        raise FailedPreconditionError(f"the socket {path} cannot be made: {error.strerror}") from error
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def bind_private(path: Path) -> socket.socket:
    """Listen for messages of this user's and root's processes, in a directory of theirs."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(os.fspath(path))
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise FailedPreconditionError(f"the socket {path} cannot be made: {error.strerror}") from error
    return sock


def bind_abstract(name: str) -> socket.socket:
    """Listen on an abstract Unix socket: it has no file and no permissions, and ends with this process.

    Raises:
        AlreadyExistsError: the name is taken.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(f"\0{name}")
    except OSError as error:
        sock.close()
        raise AlreadyExistsError(
            f"another process listens on unix://@{name}", fix="stop it, or choose another name"
        ) from error
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def bind(address: Address, mode: int) -> socket.socket:
    """Listen where the address says; `mode` is for a socket with a file. Raises as the functions for each kind."""
    if address.path is not None:
        return bind_unix(address.path, mode)
    if address.cid is not None:
        return bind_vsock(address)
    return bind_abstract(address.abstract) if address.abstract else bind_tcp(address)


def bind_vsock(address: Address) -> socket.socket:
    """Listen for guests on a vsock port.

    Raises:
        AlreadyExistsError: the port is in use.
        FailedPreconditionError: this host has no vsock.
    """
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise FailedPreconditionError(
            f"{address.text}: this host has no vsock: {error.strerror}", fix="modprobe vhost_vsock"
        ) from error
    try:
        sock.bind((address.cid, address.port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExistsError(
                f"vsock port {address.port} is in use", fix="choose another port, or stop who uses it"
            ) from error
        raise FailedPreconditionError(f"{address.text} cannot be listened on: {error.strerror}") from error
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def bind_tcp(address: Address) -> socket.socket:
    """Listen on a loopback TCP port.

    Raises:
        AlreadyExistsError: the port is in use.
        PermissionDeniedError: the port is a privileged one.
    """
    sock = socket.socket(family(address), socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExistsError(
                f"port {address.port} on {address.host} is in use", fix="choose another port, or stop who uses it"
            ) from error
        if error.errno == errno.EACCES:
            raise PermissionDeniedError(
                f"no permission to listen on port {address.port}", fix="choose a port above 1023"
            ) from error
        raise FailedPreconditionError(f"{address.text} cannot be listened on: {error.strerror}") from error
    sock.setblocking(False)
    return sock


class SocketFile:
    """The file of a listening socket: removed once, if it still is the same.

    Args:
        path: Where it is; in the directory that `directory` is a descriptor of, if that is given.
    """

    def __init__(self, path: Path, directory: int | None = None) -> None:
        self._path = path
        self._directory = directory
        self._inode = self._stat().st_ino

    def _stat(self) -> os.stat_result:
        return os.stat(self._path, dir_fd=self._directory, follow_symlinks=False)

    def remove(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._stat().st_ino == self._inode:
                os.unlink(self._path, dir_fd=self._directory)


class Listener:
    """An accept loop on the reactor. Owns its socket and, for a Unix socket, the file.

    Args:
        file: The socket's file, removed at the end; None to leave it.
        address: How a successor asks for this socket (`inherited`).
        kept: Somebody else keeps the socket open when this process ends.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_connection: Callable[[socket.socket], None],
        file: SocketFile | None = None,
        *,
        address: str = "",
        kept: bool = False,
    ) -> None:
        self.address = address
        self.kept = kept
        #: A successor listens on it: the file stays.
        self.handed_over = False
        self._reactor = reactor
        self._sock = sock
        self._on_connection = on_connection
        self._file = file
        self._closed = self._paused = self._quiet = False
        reactor.register(sock.fileno(), READ, self._accept)

    def _accept(self, _events: int) -> None:
        for _ in range(_BATCH):
            if self._closed or self._quiet:
                return
            try:
                sock, _peer = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                    return
                raise
            try:
                sock.setblocking(False)
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._on_connection(sock)
            except (OSError, RemoraError):
                sock.close()
                raise

    def _pause(self) -> None:
        """No descriptor is left: whoever waits to be accepted waits on, and the loop does not spin."""
        self._paused = True
        self._reactor.unregister(self._sock.fileno())
        self._reactor.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._paused = False
        if not self._closed and not self._quiet:
            self._reactor.register(self._sock.fileno(), READ, self._accept)

    @property
    def sock(self) -> socket.socket:
        """The listening socket, to be handed over."""
        return self._sock

    def set_quiet(self, quiet: bool) -> None:
        """Leave new connections in the kernel's queue, for whoever else has this socket; or take them again."""
        if quiet == self._quiet or self._closed:
            return
        self._quiet = quiet
        if quiet:
            self._reactor.unregister(self._sock.fileno())
        elif not self._paused:
            self._reactor.register(self._sock.fileno(), READ, self._accept)

    @property
    def port(self) -> int:
        """The TCP port, also when it was chosen by the kernel; 0 for other sockets."""
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Stop listening and remove the socket file, if it still is ours and nobody else listens on it."""
        if self._closed:
            return
        self._closed = True
        self._reactor.unregister(self._sock.fileno())
        self._sock.close()
        if self._file is not None and not self.handed_over:
            self._file.remove()
