"""Asks the node's systemd for what an installation needs of it: restart containerd, know the agent's units.

A node without systemd, or one whose systemd this process cannot reach, is told to its operator, who then does it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from remora.errors import UnavailableError

_BOOTED = Path("/run/systemd/system")  # sd_booted(3)


def reachable(root: Path) -> bool:
    """True if the node is this host, and runs systemd."""
    return root == Path("/") and _BOOTED.is_dir() and shutil.which("systemctl") is not None


def systemctl(*arguments: str) -> None:
    """
    Raises:
        UnavailableError: systemd refused; the message has its words.
    """
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise UnavailableError(
            f"systemctl {' '.join(arguments)}: {done.stderr.strip()}",
            fix="journalctl -xe has the reason; the files are in place, so the same command can be given again",
        )
