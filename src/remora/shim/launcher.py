"""Writes the program that containerd runs, so that it starts as fast as it can.

pip's own scripts load `site` and look through site-packages: twice the CPU of the whole start. This one names its
interpreter with -I -S and Remora's sources directly.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "containerd-shim-remora-v2"
_PROGRAM = """\
#!{python} -IS
import sys
sys.path.insert(0, {source!r})
from remora.shim.start import main
sys.exit(main(sys.argv))
"""


def program(python: str = sys.executable, source: str = str(Path(__file__).resolve().parents[2])) -> str:
    """Return the program: for this interpreter and these sources, or for others."""
    return _PROGRAM.format(python=python, source=source)


def write(directory: Path) -> Path:
    """Write `containerd-shim-remora-v2` into a directory on containerd's PATH; returns its path."""
    path = directory / NAME
    draft = path.with_name(f".{NAME}")
    draft.write_text(program())
    draft.chmod(0o755)
    draft.replace(path)
    return path
