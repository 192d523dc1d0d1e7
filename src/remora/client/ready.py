"""The point at which a function may be copied: `remora.ready()`.

A template is a microVM that has booted and whose function has done its slow start (imports, models loaded). It stops in
`ready()`; a snapshot is taken there, and each clone returns from it. Everything that two clones must not share is made
different before it returns: PID 1 has set host name, clock and the kernel's generator by then, and this module takes
care of what lives inside the Python process: generators that were seeded before the snapshot, and connections whose
other end exists only for the template. Outside a template it returns at once, so that a function can always call it.
"""

from __future__ import annotations

import os
import sys

from remora.errors import ProtocolError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

#: Where PID 1 listens in a microVM.
GUEST_SOCKET = "/run/remora/guest.sock"

_MAX_LINE_BYTES = 4096

_generation = 0


def generation() -> int:
    """Return how often this process came out of `ready`: a connection made before the last time is stale."""
    return _generation


def ready(socket_path: str = GUEST_SOCKET) -> bool:
    """Say that the function is ready to be copied, and return in each copy (or at once, where nothing copies).

    After it has returned, `random` and numpy's legacy generator have a seed of their own in each clone, and every
    session reconnects before its next request. Generators the program made itself (`random.Random()`,
    `numpy.random.default_rng()`) should be made after this call, or they repeat in every clone.

    Returns:
        True in a microVM, False where there is none.

    Raises:
        UnavailableError: PID 1 of the microVM went away.
        ProtocolError: something other than PID 1 answers on the socket.
    """
    global _generation  # a fact about the process, not about an object
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            return False
        try:
            sock.sendall(b"READY\n")
            line = _read_line(sock, socket_path)
        except OSError as error:
            raise UnavailableError(
                f"the connection to PID 1 at {socket_path} broke while waiting to be copied: {error}"
            ) from error
    _generation += 1
    reseed(_entropy(line, socket_path))
    return True


def reseed(entropy: bytes) -> None:
    """Give the generators that live in this process a new seed."""
    # A copy of a snapshot has the kernel's state of the snapshot until PID 1 has mixed in new entropy; it has by now.
    seed = entropy + os.urandom(32)
    random = sys.modules.get("random")
    if random is not None:
        random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        # The legacy generator takes 32-bit words.
        numpy_random.seed([int.from_bytes(seed[i : i + 4], "little") for i in range(0, len(seed) // 4 * 4, 4)])


def _read_line(sock: socket.socket, socket_path: str) -> bytes:
    received = b""
    while not received.endswith(b"\n"):
        piece = sock.recv(_MAX_LINE_BYTES)
        if not piece:
            raise UnavailableError(
                f"PID 1 at {socket_path} closed the connection before it answered",
                fix="look at the microVM's console log: `remora logs`",
            )
        received += piece
        if len(received) > _MAX_LINE_BYTES:
            break
    return received


def _entropy(line: bytes, socket_path: str) -> bytes:
    word, _, digits = line.strip().partition(b" ")
    try:
        if word != b"GO":
            raise ValueError("not GO")
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError as error:
        raise ProtocolError(f"{socket_path} answered {line[:80]!r} instead of `GO <hex entropy>`") from error
