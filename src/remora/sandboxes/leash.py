"""The line between a sandbox's monitor and whoever made it: small messages, and the news of each other's death.

One SOCK_SEQPACKET pair. The monitor reports; the maker may ask for something. When the maker dies the monitor reads end
of file and tears the sandbox down; the maker reads end of file when the monitor *and* its keeper are gone, which means
that nothing of the sandbox is left.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from remora.errors import DeadlineExceededError, RemoraError, UnavailableError, from_code

MAX_MESSAGE_BYTES = 65536


def pair() -> tuple[socket.socket, socket.socket]:
    """Return (maker's end, monitor's end)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: dict[str, Any]) -> bool:
    """Send; False if the other end is gone."""
    try:
        sock.send(json.dumps(message).encode()[:MAX_MESSAGE_BYTES])
    except OSError:
        return False
    return True


def receive(sock: socket.socket, timeout_s: float | None) -> dict[str, Any] | None:
    """Return the next message, or None when the other end is gone.

    Raises:
        DeadlineExceededError: nothing came within `timeout_s`.
    """
    sock.settimeout(timeout_s)
    try:
        data = sock.recv(MAX_MESSAGE_BYTES)
    except TimeoutError as error:
        raise DeadlineExceededError(f"the sandbox's monitor said nothing for {timeout_s:g} s") from error
    except OSError:
        return None
    return json.loads(data) if data else None


def hang_up(sock: socket.socket, sandbox: str, timeout_s: float = 20.0) -> None:
    """Let go of the monitor, which ends the sandbox, and wait until nothing of it is left.

    Raises:
        DeadlineExceededError: something still is, after `timeout_s`.
    """
    with sock:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + timeout_s
        try:
            while receive(sock, max(0.001, deadline_s - time.monotonic())) is not None:
                pass
        except DeadlineExceededError as error:
            raise DeadlineExceededError(
                f"the microVM {sandbox} did not end within {timeout_s:g} s", fix=f"remora rm -f {sandbox}"
            ) from error


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as the fields of a message."""
    if isinstance(error, RemoraError):
        return {"code": error.code, "message": error.message, "fix": error.fix}
    if isinstance(error, OSError):
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
        return {"code": UnavailableError.code, "message": what, "fix": None}
    return {"code": 13, "message": f"{type(error).__name__}: {error}", "fix": None}


def restore(message: dict[str, Any]) -> RemoraError:
    """Return the error that `describe` was given."""
    error = from_code(int(message["code"]), str(message["message"]))
    error.fix = message.get("fix")
    return error
