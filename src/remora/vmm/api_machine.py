"""What Firecracker's and Cloud Hypervisor's machines have in common: a process, its API, and one form of rates."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remora.errors import InvalidArgumentError
from remora.vmm.api import ApiClient
from remora.vmm.contract import Rate, VmSpec
from remora.vmm.process import MonitorProcess, spawn

#: A call that starts or loads a machine touches its memory; the others answer in milliseconds.
CALL_S = 30.0


class ApiMachine(MonitorProcess):
    """A monitor's process that listens, or will, at `api_path`."""

    def __init__(self, pid: int, console: socket.socket, *, api_path: Path, monitor: str, spec: VmSpec) -> None:
        super().__init__(pid, console)
        self._api = ApiClient(api_path, monitor)
        self._spec = spec

    def close(self) -> None:
        super().close()
        self._api.close()

    def _new_state(self, state: Path) -> Path:
        """Return where the memory is to go; refuses to write over a state."""
        if state.exists():
            raise FileExistsError(f"{state} exists already")
        return self._memory_file()

    def _memory_file(self) -> Path:
        if self._spec.ram_file is None:
            raise InvalidArgumentError("the machine has no file for its memory", fix="set VmSpec.ram_file")
        return self._spec.ram_file


def spawn_with_console(
    arguments: Sequence[str],
    *,
    keep_fds: Sequence[int],
    directory: Path,
    fork: Callable[[], int] = os.fork,
    network: bool = True,
) -> tuple[int, socket.socket]:
    """Start a monitor in `directory`; returns its pid and the socket that its output, with the guest's, arrives at.

    `fork` and `network` are as for `spawn`.
    """
    console, console_child = socket.socketpair()
    with console_child:
        try:
            pid = spawn(
                arguments,
                keep_fds=(console_child.fileno(), *keep_fds),
                output_fd=console_child.fileno(),
                directory=directory,
                fork=fork,
                network=network,
            )
        except BaseException:
            console.close()
            raise
    return pid, console


def limiter(field: str, rate: Rate) -> dict[str, Any]:
    """Return a rate as a token bucket per kind, refilled each second; nothing where there is no bound.

    Cloud Hypervisor took the form over from Firecracker (RateLimiter, TokenBucket; times in ms).
    """
    buckets = {
        kind: {"size": size, "refill_time": 1000}
        for kind, size in (("bandwidth", rate.bytes_per_s), ("ops", rate.operations_per_s))
        if size
    }
    return {field: buckets} if buckets else {}
