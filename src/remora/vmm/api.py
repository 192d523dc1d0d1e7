"""HTTP with JSON bodies over a Unix socket: how Firecracker and Cloud Hypervisor take commands.

One connection is kept for a machine's life, because Firecracker serves about ten in all (its API server's limit).
Blocking and single-threaded, as one thread drives one machine through its life; each call has a deadline.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from remora.errors import DeadlineExceededError, FailedPreconditionError, ProtocolError, UnavailableError
from remora.vmm.channel import connect_socket

#: Firecracker refuses longer requests (its default --http-api-max-payload-size); Cloud Hypervisor has no such bound.
MAX_BODY_BYTES = 51200
#: Longest answer that is read; the longest real one (a machine's whole configuration) has a few KB.
MAX_ANSWER_BYTES = 1 << 20
#: How often a socket that is not there yet is tried again: a monitor needs 5 to 60 ms until it listens.
RETRY_S = 0.002


class Request(NamedTuple):
    """One call: `body` is its JSON, or None for a call that takes none."""

    method: str
    path: str
    body: dict[str, Any] | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            connect_socket(self.sock, self._path)
        except OSError:
            self.sock.close()
            raise


class ApiClient:
    """The API of one monitor.

    Args:
        path: Where it listens, or will.
        monitor: Its name, for messages.
    """

    def __init__(self, path: Path, monitor: str) -> None:
        self._monitor = monitor
        self._http = _UnixConnection(path)

    def wait(self, timeout_s: float, ended: Callable[[], object | None]) -> None:
        """Wait until the monitor listens.

        Args:
            ended: Whether its process has ended, so that nobody waits for a dead one.

        Raises:
            UnavailableError: the process has ended.
            DeadlineExceededError: it does not listen within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        self._http.timeout = timeout_s
        while True:
            try:
                self._http.connect()
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if ended():
                    raise UnavailableError(f"{self._monitor} ended before it took commands") from None
                if time.monotonic() > deadline_s:
                    raise DeadlineExceededError(f"{self._monitor} took no commands within {timeout_s:g} s") from None
                time.sleep(RETRY_S)

    def send(self, request: Request, *, timeout_s: float = 10.0) -> Any:
        """Make one call and return the JSON of its answer, None if it has no body.

        Raises:
            FailedPreconditionError: the monitor refused; the message has its reason.
            UnavailableError: it is gone.
            DeadlineExceededError: it did not answer in time.
        """
        body = None if request.body is None else json.dumps(request.body, separators=(",", ":"))
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._http.sock is not None:
            self._http.sock.settimeout(timeout_s)
        self._http.timeout = timeout_s
        try:
            self._http.request(request.method, request.path, body, headers)
            answer = self._http.getresponse()
            data = answer.read(MAX_ANSWER_BYTES + 1)
        except TimeoutError as error:
            self._http.close()
            raise DeadlineExceededError(
                f"{self._monitor} did not answer {request.method} {request.path} within {timeout_s:g} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise UnavailableError(f"{self._monitor} is gone: {error or type(error).__name__}") from error
        if len(data) > MAX_ANSWER_BYTES:
            self._http.close()
            raise ProtocolError(f"{self._monitor} answered {request.path} with more than {MAX_ANSWER_BYTES} bytes")
        if answer.status >= 300:
            raise FailedPreconditionError(
                f"{self._monitor} refused {request.method} {request.path}: {reason(data) or answer.reason}"
            )
        if not data:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise ProtocolError(f"{self._monitor} answered {request.path} with {data[:80]!r}, not with JSON") from error

    def close(self) -> None:
        self._http.close()


def reason(data: bytes) -> str:
    """Return what an error's body says.

    Firecracker sends `{"fault_message": …}`, for requests that are too long `{"error": …}`; Cloud Hypervisor a list of
    messages, outermost first.
    """
    text = data.decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict):
        return str(value.get("fault_message") or value.get("error") or text)
    if isinstance(value, list):
        return ": ".join(map(str, value))
    return text
