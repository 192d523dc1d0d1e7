"""Makes a sandbox: its directory, then its processes, then waits until it runs or is gone again."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from remora import paths
from remora.errors import DeadlineExceededError, InternalError
from remora.sandboxes import leash
from remora.sandboxes.launch import Launch
from remora.sandboxes.options import Options
from remora.sandboxes.registry import Record, Registry
from remora.sandboxes.spawner import Launcher

#: After this long a caller may want to tell its user that something is going on.
SLOW_S = 2.0
#: Beyond the boot's own deadline and its retry: the monitor is stuck.
STUCK_S = 30.0
#: google.rpc codes that only a program that cannot be started gives here, and the statuses that a shell gives it.
_SHELL_STATUS = {5: 127, 7: 126}


class Started(NamedTuple):
    """A sandbox that runs."""

    record: Record
    #: Our end of the leash: closing it ends the sandbox.
    leash: socket.socket
    #: Milliseconds from the caller's beginning to each stage.
    timings: dict[str, float]
    #: Why there is no accelerator yet, if one was asked for.
    warning: str


def start(
    options: Options,
    make: Callable[[Record], Launch],
    fields: dict[str, Any],
    *,
    launcher: Launcher,
    on_slow: Callable[[], None] | None = None,
) -> Started:
    """Create the directory, start the monitor with what `make` returns, and wait until the sandbox runs.

    Raises:
        AlreadyExistsError: the name is taken.
        RemoraError: what the monitor reports; nothing of the sandbox is left then.
    """
    registry = Registry(paths.runtime_dir())
    fields = {
        "name": options.name,
        "labels": dict(options.labels),
        "tenant": options.tenant,
        "cpus": options.cpus,
        "memory_mib": options.memory_mib,
        "detached": options.detached,
        "created_s": time.time(),
        "control_socket": str(paths.control_socket()) if options.accelerator else "",
        **fields,
    }
    ours, theirs = leash.pair()
    with theirs:
        try:
            record, lock_fd = registry.create(fields, options.jail)
        except BaseException:
            ours.close()
            raise
        try:
            launch = make(record)
            launcher.start(launch, record.fields, lock_fd=lock_fd, leash_fd=theirs.fileno())
        except BaseException:
            ours.close()
            registry.remove(record.directory)
            raise
        finally:
            os.close(lock_fd)
    try:
        message = _first_message(ours, launch, on_slow)
    except BaseException:
        leash.hang_up(ours, record.id)
        raise
    return Started(record, ours, dict(message["stamps"]), str(message.get("warning", "")))


def _first_message(sock: socket.socket, launch: Launch, on_slow: Callable[[], None] | None) -> dict[str, Any]:
    deadline_s = time.monotonic() + 3 * launch.boot_timeout_s + STUCK_S
    try:
        message = leash.receive(sock, SLOW_S)
    except DeadlineExceededError:
        if on_slow is not None:
            on_slow()
        message = leash.receive(sock, deadline_s - time.monotonic())
    if message is None:
        raise InternalError(
            "the monitor of the microVM ended before the microVM ran", fix="try again with --debug and report this"
        )
    if message["event"] != "started":
        error = leash.restore(message)
        error.exit_status = _SHELL_STATUS.get(error.code, error.exit_status)
        raise error
    return message
