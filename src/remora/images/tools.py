"""Runs other programs so that they end with us: a killed command must leave no mmdebstrap, skopeo or pip."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence

_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--")


def leashed(argv: Sequence[str]) -> list[str]:
    """Return `argv` started through setpriv(1), which asks the kernel for SIGTERM when its parent dies.

    setpriv is part of util-linux, an essential package; where it is missing the program runs without that.
    """
    return ["setpriv", "--pdeathsig", "TERM", "--", *argv] if shutil.which("setpriv") else list(argv)


def contained(argv: Sequence[str]) -> list[str]:
    """Return `argv` started so that SIGKILL to it, or our death, ends all that it has started as well.

    Asked to end, mmdebstrap waits for its apt-get, and one that hangs keeps both. The end of a PID namespace is the end
    of everything in it (pid_namespaces(7)). Without root, or where there are none, it is `leashed`.
    """
    if not _has_pid_namespaces():
        return leashed(argv)
    # unshare itself ignores SIGTERM.
    return ["setpriv", "--pdeathsig", "KILL", "--", *_UNSHARE, *argv]


@functools.cache
def _has_pid_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("setpriv") is None or shutil.which("unshare") is None:
        return False
    return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0
