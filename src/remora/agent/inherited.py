"""Listening sockets that were open before this process began, so that nobody who connects in between is refused.

They come from systemd, which keeps them across restarts (socket activation), or from the agent that this one succeeds
(`handover`). Connections wait in the kernel's queue meanwhile. Whoever listens asks here first, by address.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from remora.agent.addresses import Address, parse_listen_address
from remora.agent.listeners import bind
from remora.errors import FailedPreconditionError, RemoraError

#: The first descriptor that systemd passes (sd_listen_fds(3)).
_FIRST = 3


class Inherited:
    """Open listening sockets by address; owns those that nobody has taken."""

    def __init__(self, sockets: Iterable[tuple[str, socket.socket]] = (), *, kept: bool = False) -> None:
        """
        Args:
            sockets: Each with the address to which it answers.
            kept: Whoever passed them keeps them open: their files are not this process's to remove.
        """
        self._sockets = list(sockets)
        self.kept = kept

    def addresses(self) -> list[Address]:
        """Return the addresses of what nobody has taken yet."""
        return [parse_listen_address(text) for text, _sock in self._sockets]

    def bind(self, address: Address, mode: int) -> tuple[socket.socket, bool]:
        """Return a socket that listens at an address, and whether somebody else keeps it open, too.

        Raises as `listeners.bind`.
        """
        sock = self.take(address)
        return (bind(address, mode), False) if sock is None else (sock, self.kept)

    def take(self, address: Address) -> socket.socket | None:
        """Return the socket that listens at an address, if it is among these."""
        for index, (text, sock) in enumerate(self._sockets):
            if text == address.text:
                del self._sockets[index]
                if address.path is not None and not _is_socket(address.path):
                    sock.close()  # its file is gone: nobody could find it
                    return None
                sock.setblocking(False)
                return sock
        return None

    def close(self) -> None:
        """Close what nobody has taken, and remove the files of those, unless they are somebody else's."""
        for text, sock in self._sockets:
            sock.close()
            _, is_path, path = text.partition("unix:///")  # not parsed: it may be longer than an address of our own
            if is_path and not self.kept:
                Path("/", path).unlink(missing_ok=True)
        self._sockets.clear()


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def from_systemd(environ: MutableMapping[str, str]) -> Inherited:
    """Take the sockets that systemd passes (sd_listen_fds(3)), if it does.

    A socket's FileDescriptorName may be what precedes the address in `--listen`: `oip`, `tls` or `oip+tls`.

    Raises:
        FailedPreconditionError: one of them is not a listening stream socket.
        InvalidArgumentError: its address is none that the agent may listen on, such as TCP beyond loopback.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return Inherited()
    taken: list[tuple[str, socket.socket]] = []
    try:
        for index in range(int(count)):
            fd = _FIRST + index
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            sock = socket.socket(fileno=fd)
            taken.append(("", sock))
            if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise FailedPreconditionError(
                    f"descriptor {fd}, which systemd passes, is not a listening stream socket",
                    fix="use ListenStream= and no Accept=yes in the .socket unit",
                )
            taken[-1] = (_address_of(sock, names[index] if index < len(names) else ""), sock)
    except (OSError, RemoraError) as error:
        for _text, sock in taken:
            sock.close()
        if isinstance(error, RemoraError):
            raise
        raise FailedPreconditionError(f"LISTEN_FDS={count}, and not as many sockets are open: {error}") from error
    return Inherited(taken, kept=True)


def _address_of(sock: socket.socket, name: str) -> str:
    """Return a listening socket's address as `--listen` has it, checked."""
    door = "oip+" if name.startswith("oip") else ""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        shown = f"@{where[1:].decode('utf-8', 'replace')}" if isinstance(where, bytes) else where
        text = f"unix://{shown}"
    elif sock.family == socket.AF_VSOCK:
        text = f"vsock://{'' if where[0] == socket.VMADDR_CID_ANY else where[0]}:{where[1]}"
    else:
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        text = f"{'tls' if name.endswith('tls') else 'tcp'}://{host}:{where[1]}"
    return parse_listen_address(f"{door}{text}").text
