"""Where a guest's channel is on the host, and how to open a stream to it: the same for every VMM.

Firecracker's hybrid vsock is the model (its docs/vsock.md): `<directory>/channel.sock` takes `CONNECT <port>\\n` in one
write and answers `OK <n>\\n`; a guest's connect to port P arrives at `<directory>/channel.sock_P`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from remora.errors import UnavailableError

SOCKET_NAME = "channel.sock"
#: `CONNECT 4294967295\n`; Firecracker reads 32 bytes at most, too.
MAX_CONNECT_LINE = 32


def guest_socket(directory: Path, port: int) -> Path:
    """Return where a guest's connect to `port` arrives."""
    return directory / f"{SOCKET_NAME}_{port}"


def connect_socket(sock: socket.socket, path: Path) -> None:
    """Connect to the socket file at `path` itself, however long the path is.

    The directory may belong to a monitor that its guest has taken over, and a link there to another socket of the host
    would have us speak to that one: the file is held open as what it is before anybody connects to it.

    Raises:
        OSError: there is no socket (ENOTSOCK: something else), or nobody listens.
    """
    # Opened without following and without a use (open(2), O_PATH); its name in /proc then leads to that very file.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), str(path))
        sock.connect(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def connect(directory: Path, port: int, timeout_s: float) -> socket.socket:
    """Open a stream to a guest's port, as any VMM's hybrid vsock takes it; returns a blocking socket.

    Raises:
        UnavailableError: there is no channel, or nothing listens on that port in the guest.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        connect_socket(sock, directory / SOCKET_NAME)
        sock.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte or len(line) > MAX_CONNECT_LINE:
                raise UnavailableError(f"the guest does not answer on port {port}")
            line += byte
        if not line.startswith(b"OK "):
            raise UnavailableError(f"the guest's channel answered {line!r}")
        sock.settimeout(None)
    except TimeoutError as error:
        sock.close()
        raise UnavailableError(f"the guest did not answer on port {port} within {timeout_s:g} s") from error
    except OSError as error:
        sock.close()
        raise UnavailableError(f"the guest cannot be reached: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return sock
