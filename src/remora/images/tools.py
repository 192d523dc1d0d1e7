"""Runs other programs so that they end with us: a killed command must leave no mmdebstrap, skopeo or pip."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def leashed(argv: Sequence[str]) -> list[str]:
    """Return `argv` started through setpriv(1), which asks the kernel for SIGTERM when its parent dies.

    setpriv is part of util-linux, an essential package; where it is missing the program runs without that.
    """
    return ["setpriv", "--pdeathsig", "TERM", "--", *argv] if shutil.which("setpriv") else list(argv)
