"""Where Remora keeps things on a host: one place decides, so that no two rooms disagree.

State (images, templates, models, the agent's store) survives a reboot; run-time files (sockets, sandbox directories)
do not. root uses the system's directories, everyone else the XDG ones; `REMORA_STATE_DIR` and `REMORA_RUNTIME_DIR`
override both. Socket paths must stay below 108 bytes (unix(7)), so the run-time directory is a short one.
"""

from __future__ import annotations

import os
from pathlib import Path

AGENT_SOCKET = "accel.sock"
CONTROL_SOCKET = "control.sock"


def state_dir() -> Path:
    """Return the directory of what survives a reboot; the caller creates what it needs below it."""
    if given := os.environ.get("REMORA_STATE_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/remora")
    data_home = os.environ.get("XDG_DATA_HOME")
    return Path(data_home) / "remora" if data_home else Path.home() / ".local/share/remora"


def runtime_dir() -> Path:
    """Return the directory of sockets and live sandboxes (mode 0700, owned by the caller)."""
    if given := os.environ.get("REMORA_RUNTIME_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/run/remora")
    run_home = os.environ.get("XDG_RUNTIME_DIR")
    return Path(run_home) / "remora" if run_home else Path(f"/tmp/remora-{os.geteuid()}")


def agent_socket() -> Path:
    """Return where the agent listens unless told otherwise."""
    return runtime_dir() / AGENT_SOCKET


def control_socket() -> Path:
    """Return the agent's control socket (owner only)."""
    return runtime_dir() / CONTROL_SOCKET
