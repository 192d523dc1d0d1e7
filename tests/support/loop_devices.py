"""Real block devices of the host for tests: loop devices over files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unavailable() -> str:
    """Return why this host has no loop devices; empty if it has."""
    if os.geteuid():
        return "loop devices need root"
    done = subprocess.run(["losetup", "--find"], capture_output=True, text=True, check=False)
    return f"no loop device: {done.stderr.strip()}" if done.returncode else ""


class LoopDevice:
    def __init__(self, file: Path, size_bytes: int) -> None:
        """`size_bytes` 0: over something that is there, such as another device."""
        if size_bytes:
            file.touch()
            os.truncate(file, size_bytes)
        made = subprocess.run(
            ["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=True, timeout=30
        )
        self.file = file
        self.path = made.stdout.strip()

    @property
    def attached(self) -> bool:
        return Path(f"/sys/block/{Path(self.path).name}/loop").exists()

    def detach(self) -> None:
        """Ask for its end. A device that somebody holds open stays attached until that is closed."""
        subprocess.run(["losetup", "--detach", self.path], capture_output=True, check=False, timeout=30)

    def read(self, size: int, offset: int = 0) -> bytes:
        """Return what a reader on the host sees."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)


@contextmanager
def loop_device(file: Path, size_bytes: int = 16 << 20) -> Iterator[LoopDevice]:
    one = LoopDevice(file, size_bytes)
    try:
        yield one
    finally:
        if one.attached:
            one.detach()
