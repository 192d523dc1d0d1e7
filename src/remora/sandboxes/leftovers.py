"""Finds what outlived its owner: the proof, for the demo and the tests, that nothing was left behind.

It looks at the kernel's own lists and not at Remora's records, because a record that was lost is how leftovers happen.
"""

from __future__ import annotations

import os
from pathlib import Path


def find_leftovers(directory: Path) -> list[str]:
    """Return a line for each process, mount, socket and file that has to do with `directory`.

    Args:
        directory: a run-time directory that only the things in question use. It may be gone.
    """
    name = str(directory)
    return [
        *_processes(name),
        *(f"mount {line.split()[1]}" for line in _lines("/proc/self/mounts") if name in line),
        *(f"socket {line.split()[-1]}" for line in _lines("/proc/net/unix") if name in line),
        *(f"file {path}" for path in sorted(directory.rglob("*"))),
    ]


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines()


def _processes(name: str) -> list[str]:
    """Find processes that name the directory in arguments or environment or have a file in it open (never our own)."""
    needle = name.encode()
    ours = {os.getpid(), os.getppid()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours:
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if not command:
                continue  # a kernel thread or a zombie
            if needle in command or needle in (entry / "environ").read_bytes() or _has_open(entry, name):
                found.append(
                    f"process {entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}"
                )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def _has_open(process: Path, name: str) -> bool:
    for descriptor in (process / "fd").iterdir():
        try:
            if name in os.readlink(descriptor):
                return True
        except FileNotFoundError:
            continue
    return False
