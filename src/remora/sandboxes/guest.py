"""Talks to PID 1 of a microVM: the control service as methods, stdio as sockets.

Thread-safe as the ttrpc client under it is: one thread may wait for the process while another sends it signals.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora.errors import RemoraError, UnavailableError
from remora.sandboxes.launch import MountSpec, ProcessSpec
from remora.vmm import channel
from remora.wire import guest_v1 as v1
from remora.wire.ttrpc.sync import Client

MAIN = "main"
#: How long a guest that is up may take for a small request; emulated guests on a busy host are slow.
CALL_TIMEOUT_S = 30.0
#: How soon a guest that is not up yet is tried again.
RETRY_S = 0.01
#: The largest is a list of some ten thousand processes. A guest decides itself what it sends, on every call that waits.
MAX_ANSWER_BYTES = 256 << 10


def identity(sandbox: str, hostname: str) -> v1.Identity:
    """Return what makes this microVM itself, with the host's time and fresh entropy."""
    return v1.Identity(sandbox=sandbox, hostname=hostname, time_ns=time.time_ns(), entropy=os.urandom(64))


def process(spec: ProcessSpec) -> v1.Process:
    return v1.Process(
        args=list(spec.args),
        env=list(spec.env),
        cwd=spec.cwd,
        user=spec.user,
        terminal=spec.terminal,
        rows=spec.rows,
        columns=spec.columns,
        stdin=spec.stdin,
    )


class Guest:
    """The control connection to one guest."""

    def __init__(self, directory: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Connect through the channel in `directory`, waiting at most `timeout_s` for the guest to answer.

        Raises:
            UnavailableError: the guest does not answer.
        """
        self._directory = directory
        sock = channel.connect(directory, v1.CONTROL_PORT, timeout_s)
        self._client = Client(sock, max_message_bytes=MAX_ANSWER_BYTES)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, request: Any, timeout_s: float | None = CALL_TIMEOUT_S) -> Any:
        return self.call(v1.SERVICE, method, request, v1.METHODS[method][1], timeout_s)

    def call(self, service: str, method: str, request: Any, response: type[Any], timeout_s: float | None) -> Any:
        """Call any service of the guest."""
        return self._client.call(service, method, request, response, timeout_s=timeout_s)

    def ping(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._call("Ping", v1.Empty(), timeout_s)

    def setup(
        self, who: v1.Identity, layers: tuple[str, ...], mounts: tuple[MountSpec, ...], *, readonly_root: bool
    ) -> None:
        request = v1.SetupRequest(
            identity=who,
            layers=list(layers),
            mounts=[
                v1.Mount(type=m.type, source=m.source, destination=m.destination, readonly=m.readonly) for m in mounts
            ],
            readonly_root=readonly_root,
        )
        self._call("Setup", request)

    def start(self, process_id: str, what: v1.Process) -> int:
        """Start a process; returns its pid in the guest."""
        return int(self._call("Start", v1.StartRequest(id=process_id, process=what)).pid)

    def wait(self, process_id: str, timeout_s: float | None = None, *, drain_s: float = 0.0) -> v1.WaitResponse:
        """Wait for the end of a process, after all its output has been handed to its streams, or `drain_s` later.

        Raises:
            DeadlineExceededError: it still runs after `timeout_s`.
        """
        response: v1.WaitResponse = self._call("Wait", v1.WaitRequest(id=process_id, drain_s=drain_s), timeout_s)
        return response

    def signal(
        self, process_id: str, signum: int, *, everything: bool = False, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        self._call("Signal", v1.SignalRequest(id=process_id, signal=signum, all=everything), timeout_s)

    def resize(self, process_id: str, rows: int, columns: int) -> None:
        self._call("Resize", v1.ResizeRequest(id=process_id, rows=rows, columns=columns))

    def close_stdin(self, process_id: str) -> None:
        self._call("CloseStdin", v1.CloseStdinRequest(id=process_id))

    def stats(self) -> v1.StatsResponse:
        response: v1.StatsResponse = self._call("Stats", v1.Empty())
        return response

    def devices(self) -> v1.DevicesResponse:
        response: v1.DevicesResponse = self._call("Devices", v1.Empty())
        return response

    def wait_ready(self, timeout_s: float) -> None:
        self._call("WaitReady", v1.Empty(), timeout_s)

    def resume(self, who: v1.Identity) -> None:
        self._call("Resume", who)

    def sync(self) -> None:
        self._call("Sync", v1.Empty())

    def shutdown(self, timeout_s: float) -> None:
        """Ask the guest to end everything and power off; it may be gone before it answers."""
        try:
            self._call("Shutdown", v1.Empty(), timeout_s)
        except UnavailableError:
            pass  # that is how a guest that powers off answers

    def open_stream(self, process_id: str, name: str, timeout_s: float = CALL_TIMEOUT_S) -> socket.socket:
        """Return the raw stream `stdin`, `stdout`, `stderr` or `tty` of a process."""
        return open_stream(self._directory, process_id, name, timeout_s)


def open_stream(directory: Path, process_id: str, name: str, timeout_s: float = CALL_TIMEOUT_S) -> socket.socket:
    sock = channel.connect(directory, v1.STDIO_PORT, timeout_s)
    try:
        sock.sendall(f"{process_id} {name}\n".encode())
    except OSError as error:
        sock.close()
        raise UnavailableError(f"the guest closed the stream {name}: {error.strerror}") from error
    return sock


def connect_when_up(directory: Path, timeout_s: float, *, gone: Callable[[], bool] | None = None) -> Guest:
    """Return the control connection of a guest that is booting.

    Args:
        gone: Given where the monitor serves the channel itself: that rejects streams until the guest listens, so they
            are tried until `gone` says that there is no machine any more. Else the bridge keeps one until then.

    Raises:
        UnavailableError: it was not up within `timeout_s`, or its channel ended.
    """
    deadline_s = time.monotonic() + timeout_s
    while gone is not None:
        try:
            return _connect_when_up(directory, max(deadline_s - time.monotonic(), RETRY_S))
        except UnavailableError:
            if gone() or time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)
    return _connect_when_up(directory, timeout_s)


def _connect_when_up(directory: Path, timeout_s: float) -> Guest:
    guest = Guest(directory, timeout_s=timeout_s)
    try:
        guest.ping(timeout_s)
    except RemoraError:
        guest.close()
        raise
    return guest
