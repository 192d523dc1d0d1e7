"""The shim's actions besides `start`: `delete`, `-info`, `-v`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import remora
from remora.errors import InvalidArgumentError
from remora.shim import start
from remora.wire import containerd as c
from remora.wire.protobuf import Message

_RUNTIME = "io.containerd.remora.v2"
_KILLED = 137
#: Of containerd's 5 s for this command.
_LEAVE_S = 3.0


def run(flags: dict[str, str], action: str) -> int:
    """Do what was asked for; returns the exit status.

    Raises:
        InvalidArgumentError: nothing that a shim does.
    """
    if "v" in flags:
        print(f"containerd-shim-remora-v2:\n  Version:  {remora.__version__}")
        return 0
    if "info" in flags:
        _write(
            c.RuntimeInfo(
                name=_RUNTIME,
                version=c.RuntimeVersion(version=remora.__version__),
                annotations={"containerd.io/runtime-allow-mounts": "erofs"},
            )
        )
        return 0
    if action == "delete":
        return delete(flags)
    raise InvalidArgumentError(
        f"a containerd shim has no action {action!r}", fix="it is run by containerd: start, delete, -info or -v"
    )


def delete(flags: dict[str, str]) -> int:
    """Clear up after a container, and if it was the pod's own, after the whole pod. Runs after every ordinary end, too,
    and finds nothing to do then."""
    bundle = Path(flags.get("bundle") or os.getcwd())
    try:
        config = (bundle / "config.json").read_bytes()
    except OSError:
        config = b""
    if start.annotation(config, b'"io.kubernetes.cri.container-type"') != "container":
        _clear_pod(config, flags)
    now_ns = time.time_ns()
    exited_at = c.Timestamp(seconds=now_ns // 10**9, nanos=now_ns % 10**9)
    _write(c.DeleteResponse(pid=0, exit_status=_KILLED, exited_at=exited_at))
    return 0


def _clear_pod(config: bytes, flags: dict[str, str]) -> None:
    """Clear a pod by what the host knows of it: its server may have been killed before it could write anything down."""
    from remora import paths
    from remora.sandboxes import clearing
    from remora.sandboxes.registry import Registry
    from remora.shim import cgroups

    sandbox = flags.get("id", "")
    registry = Registry(paths.runtime_dir())
    records = [record for record in registry.all() if record.fields.get("container") == sandbox]
    for record in records:
        if registry.is_alive(record):
            _end_server(int(record.fields.get("monitor_pid") or 0))
    # Before anything that may wait: an agent that does not answer must not cost the rest its time.
    _unlink(start.socket_path(flags.get("address", ""), flags.get("namespace", ""), sandbox))
    groups = cgroups.existing(_cgroups_path(config))
    _leave(groups)
    registry.clear_unfinished()
    for record in records:
        clearing.clear(record.directory, {**record.fields, "control_socket": ""})
    for record in records:
        # There is nothing left of it now but what the agent may know.
        clearing.clear(record.directory, {**record.fields, "id": record.fields.get("attached_as") or record.id})


def _leave(groups: list[str]) -> None:
    from remora.shim import cgroups

    deadline_s = time.monotonic() + _LEAVE_S
    while groups and time.monotonic() < deadline_s:
        # The last processes are on their way out of them.
        cgroups.remove(groups)
        groups = [group for group in groups if os.path.isdir(group)]
        time.sleep(0.01 if groups else 0)


def _cgroups_path(config: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(config)["linux"]["cgroupsPath"])
    return ""


def _end_server(pid: int) -> None:
    """End a server that still runs although containerd has given it up."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            if pid and file.read().startswith("remora-shim"):
                os.kill(pid, signal.SIGKILL)
    except OSError:
        pass  # it has ended


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _write(message: Message) -> None:
    sys.stdout.buffer.write(b"".join(message.encode()))
    sys.stdout.buffer.flush()
