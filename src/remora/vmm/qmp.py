"""QMP, the control protocol of QEMU, over a connected socket: just what a microVM's life needs.

Blocking and single-threaded on purpose: one thread drives one machine through its life, and each call has a deadline.
Format: one JSON object per line; after a greeting `qmp_capabilities`, then commands; events may come between a command
and its reply (QEMU's docs/interop/qmp-spec).
"""

from __future__ import annotations

import array
import json
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from remora.errors import DeadlineExceededError, FailedPreconditionError, ProtocolError, UnavailableError

#: Longest line that QEMU may send; the longest real one (query-qmp-schema, never asked here) has 200 KB.
MAX_LINE_BYTES = 1 << 20
#: Events kept until somebody asks; older ones are dropped.
MAX_EVENTS = 64


class QmpClient:
    """One QMP conversation. Takes over `sock`; `close` it at the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.version = ""

    def handshake(self, timeout_s: float) -> None:
        """Take the greeting and enter command mode."""
        greeting = self._read(time.monotonic() + timeout_s, "greeting")
        try:
            number = greeting["QMP"]["version"]["qemu"]
            self.version = f"{number['major']}.{number['minor']}.{number['micro']}"
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"QEMU did not greet as QMP does: {greeting}") from error
        self.command("qmp_capabilities", timeout_s=timeout_s)

    def command(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = 10.0,
    ) -> Any:
        """Run a command and return its result; `fds` travel beside it (for `getfd`).

        Raises:
            FailedPreconditionError: QEMU refused the command; the message has its reason.
            UnavailableError: QEMU closed the connection.
            DeadlineExceededError: no reply within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        line = json.dumps(request).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendmsg([line], ancillary)
        except TimeoutError as error:
            raise DeadlineExceededError(f"QEMU took no command '{name}' within {timeout_s:g} s") from error
        except OSError as error:
            raise UnavailableError(f"QEMU is gone: {error.strerror}") from error
        while True:
            reply = self._read(deadline_s, name)
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise FailedPreconditionError(f"QEMU refused '{name}': {reply['error'].get('desc', reply['error'])}")
            elif "return" in reply:
                return reply["return"]
            else:
                raise ProtocolError(f"QEMU answered '{name}' with {reply}")

    def close(self) -> None:
        self._sock.close()

    def _read(self, deadline_s: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceededError(f"QEMU did not answer '{what}' in time")
            self._sock.settimeout(left_s)
            try:
                data = self._sock.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise UnavailableError(f"QEMU is gone: {error.strerror}") from error
            if not data:
                raise UnavailableError(f"QEMU ended before it answered '{what}'")
            self._buffer += data
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ProtocolError(f"QEMU sent a line of more than {MAX_LINE_BYTES} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"QEMU sent a line that is not JSON: {line[:80]!r}") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"QEMU sent {line[:80]!r} where an object belongs")
        return message
