"""The shim's actions besides `start`: `delete`, `-info`, `-v`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

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
        _clear_pod(bundle, flags)
    now_ns = time.time_ns()
    exited_at = c.Timestamp(seconds=now_ns // 10**9, nanos=now_ns % 10**9)
    _write(c.DeleteResponse(pid=0, exit_status=_KILLED, exited_at=exited_at))
    return 0


def _clear_pod(bundle: Path, flags: dict[str, str]) -> None:
    from remora.sandboxes import clearing
    from remora.shim import cgroups
    from remora.shim.pod import NOTE_NAME

    note = _json(bundle / NOTE_NAME)
    directory = Path(str(note.get("directory") or "/nonexistent"))
    fields = _json(directory / "state.json")
    _end_server(int(fields.get("monitor_pid") or 0))
    if directory.exists():
        clearing.clear(directory, {**fields, "id": fields.get("attached_as") or directory.name})
    _unlink(start.socket_path(flags.get("address", ""), flags.get("namespace", ""), flags.get("id", "")))
    groups = [str(group) for group in note.get("cgroups") or []]
    deadline_s = time.monotonic() + _LEAVE_S
    while groups and time.monotonic() < deadline_s:
        # The last processes are on their way out of them.
        cgroups.remove(groups)
        groups = [group for group in groups if os.path.isdir(group)]
        time.sleep(0.01 if groups else 0)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # gone already, or never written
    return value if isinstance(value, dict) else {}


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
