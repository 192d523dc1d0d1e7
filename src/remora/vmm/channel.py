"""Where a guest's channel is on the host, and how to open a stream to it: the same for every VMM.

Firecracker's hybrid vsock is the model (its docs/vsock.md): `<directory>/channel.sock` takes `CONNECT <port>\\n` in one
write and answers `OK <n>\\n`; a guest's connect to port P arrives at `<directory>/channel.sock_P`.
"""

from __future__ import annotations

import socket
from pathlib import Path

from remora.errors import UnavailableError

SOCKET_NAME = "channel.sock"
#: `CONNECT 4294967295\n`; Firecracker reads 32 bytes at most, too.
MAX_CONNECT_LINE = 32


def guest_socket(directory: Path, port: int) -> Path:
    """Return where a guest's connect to `port` arrives."""
    return directory / f"{SOCKET_NAME}_{port}"


def connect(directory: Path, port: int, timeout_s: float) -> socket.socket:
    """Open a stream to a guest's port, as any VMM's hybrid vsock takes it; returns a blocking socket.

    Raises:
        UnavailableError: there is no channel, or nothing listens on that port in the guest.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(directory / SOCKET_NAME))
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
