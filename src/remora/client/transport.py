"""From an address to a connected socket, or to an error that says what was tried and how to get an agent.

"Connection refused" helps nobody who writes a function: the reader needs to know which places were looked at, why each
failed, and which command starts an agent there.
"""

from __future__ import annotations

import socket
import time

from remora.client.address import Address
from remora.errors import DeadlineExceededError, FailedPreconditionError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Sequence, Tuple, Union

    from remora.errors import RemoraError

    SocketAddress = Union[bytes, str, Tuple[int, int], Tuple[str, int]]

#: Enough for several tensors of an image model, so that a request seldom waits for the agent to read.
_BUFFER_BYTES = 1 << 20


def plan(address: Address) -> Tuple[int, SocketAddress]:
    """Return the socket family and what `connect` takes for this address.

    Raises:
        FailedPreconditionError: this Python has no such sockets.
    """
    if address.kind == "unix":
        return socket.AF_UNIX, "\0" + address.host[1:] if address.host.startswith("@") else address.host
    if address.kind == "vsock":
        family = getattr(socket, "AF_VSOCK", None)
        if family is None:
            raise FailedPreconditionError(
                f"{address} needs vsock, and this Python was built without it",
                fix="use a Unix socket: REMORA_ADDRESS=unix:///run/remora/accel.sock",
            )
        return family, (int(address.host), address.port)
    return (socket.AF_INET6 if ":" in address.host else socket.AF_INET), (address.host, address.port)


def new_socket(address: Address) -> socket.socket:
    """Return a socket that can be connected to `address`, with what both kinds of client want of it."""
    sock = socket.socket(plan(address)[0], socket.SOCK_STREAM)
    try:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    except BaseException:
        sock.close()
        raise
    return sock


def open_socket(address: Address, timeout_s: float) -> socket.socket:
    """Return a blocking socket that is connected to `address`; for `tls` its plain end.

    Raises:
        OSError: nothing answers there.
        FailedPreconditionError: this Python has no such sockets, or the certificates cannot be used.
        UnauthenticatedError, UnavailableError: the TLS handshake failed.
    """
    began_s = time.monotonic()
    if address.kind == "tls":
        from remora.client import tls  # OpenSSL costs a guest 3 MB that only this needs

        # Names are resolved: who answers there has to prove the name.
        sock = socket.create_connection((address.host, address.port), timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return tls.open_socket(address, sock, max(0.1, timeout_s - (time.monotonic() - began_s)))
    sock = new_socket(address)
    try:
        sock.settimeout(timeout_s)
        sock.connect(plan(address)[1])
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def refusal(sock: object) -> Optional[RemoraError]:
    """Return what is to be told instead of the end of a new connection: that its certificate was not accepted."""
    if getattr(sock, "tunnel", None) is None:
        return None
    from remora.client import tls

    return tls.refusal(sock)


def no_agent(tried: Sequence[Tuple[Address, Exception]]) -> UnavailableError:
    """Return the error for having found no agent anywhere."""
    lines: List[str] = [f"{address} [{address.origin}]: {_reason(error)}" for address, error in tried]
    where = tried[0][0]
    if where.kind == "vsock":
        fix = "start an agent on the host, or set REMORA_ADDRESS to where one listens"
    else:
        command = "remora agent" if where.origin == "default" else f"remora agent --listen {where.url}"
        fix = f"start one with `{command}`, or set REMORA_ADDRESS to where one listens"
    return UnavailableError(f"no agent found; tried {'; '.join(lines)}", fix=fix)


def silent(address: Address, timeout_s: float) -> UnavailableError:
    """Return the error for a listener that does not behave as an agent."""
    return UnavailableError(
        f"{address} took the connection and did not answer Hello within {timeout_s:g} s",
        fix="see whether an agent listens there, and whether it hangs: `remora agent status`",
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such socket"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there (any more)"
    if isinstance(error, PermissionError):
        return "this user may not connect to it"
    if isinstance(error, (socket.timeout, TimeoutError, DeadlineExceededError)):
        return "no answer in time"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error)
