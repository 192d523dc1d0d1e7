"""The process at the other end of a Unix socket, held by a pidfd while /proc is read about it.

A process id alone is no identity: its process can end, and the number can be another's, between two looks. The kernel
hands out a pidfd of the peer itself (SO_PEERPIDFD, Linux 6.5); what was read while that process still lived is about
it. Older kernels give only the number, so there a process that ended and whose number came back before its connection
was accepted is taken for its successor; that the successor lives through the look is checked all the same.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from remora.errors import UnauthenticatedError

#: include/uapi/asm-generic/socket.h; not in Python's `socket`.
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("3i")
_INT = struct.Struct("i")
#: /proc/<pid>/cgroup: one line per hierarchy, each at most a path (PATH_MAX) and some names.
_MOST_BYTES = 64 << 10


def peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end of a Unix socket, as the kernel knows it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid


def peer_pid(sock: socket.socket) -> int:
    """Return the number of the process at the other end; 0: it is in no process namespace that the agent sees."""
    pid: int = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    return pid


def cgroups(sock: socket.socket) -> str:
    """Return the text of /proc/<pid>/cgroup (cgroups(7)) of the process that connected.

    Raises:
        UnauthenticatedError: it has ended, or the agent cannot see it.
    """
    with _pidfd(sock) as fd:
        pid = process_id(fd)
        if pid == 0:
            raise UnauthenticatedError(
                "the caller is a process that the agent cannot see",
                fix="run the agent in the host's process namespace (hostPID: true)",
            )
        try:
            with open(f"/proc/{pid}/cgroup", "rb") as file:
                text = file.read(_MOST_BYTES)
        except OSError as error:
            if pid < 0 or error.errno in (errno.ENOENT, errno.ESRCH):
                raise _gone() from error
            raise UnauthenticatedError(f"/proc/{pid}/cgroup of the caller is not readable: {error.strerror}") from error
        if has_ended(fd):
            raise _gone()
    return text.decode("utf-8", "surrogateescape")


def _gone() -> UnauthenticatedError:
    return UnauthenticatedError(
        "the process that made this connection has ended, so nobody knows whose it is",
        fix="connect from the process that sends the requests, or from one that outlives them",
    )


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)  # readable once the process has ended (pidfd_open(2))
    return bool(poll.poll(0))


def hold_peer(sock: socket.socket) -> int:
    """Return a pidfd of the process that connected, or that listens where this socket connected to (unix(7)).

    Raises:
        UnauthenticatedError: it has ended.
    """
    try:
        fd: int = _INT.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))[0]
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise _gone() from error
        try:
            fd = os.pidfd_open(peer_pid(sock))
        except OSError as failure:
            raise _gone() from failure
    return fd


@contextmanager
def _pidfd(sock: socket.socket) -> Iterator[int]:
    fd = hold_peer(sock)
    try:
        yield fd
    finally:
        os.close(fd)


def process_id(pidfd: int) -> int:
    """Return a process's number in our namespace; 0: not in it, -1: it has ended (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                return int(line[4:])
    return 0
