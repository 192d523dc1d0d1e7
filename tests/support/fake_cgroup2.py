"""A directory tree that behaves like cgroupfs version 2 where the agent looks, for machines that have version 1 only.

What is the kernel's part and is played here: a new directory gets its files at once; `cgroup.subtree_control` says
which controllers the directories below have, and may not be written while processes are in the directory itself (but in
the root); writing 0 to `cgroup.procs` moves the writer; a directory with processes or directories in it is not removed.
Source: Linux, Documentation/admin-guide/cgroup-v2.rst. What it cannot play: bounds that bind.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path, PosixPath
from typing import Any

#: Controller -> its files in a directory that is not the root, with what they hold at first.
FILES = {
    "memory": {
        "memory.max": "max\n",
        "memory.swap.max": "max\n",
        "memory.oom.group": "0\n",
        "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
    },
    "pids": {"pids.max": "max\n"},
    "cpu": {"cpu.max": "max 100000\n"},
}


class FakeCgroup2Path(PosixPath):
    """A path in such a tree, or beside it."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        existed = self.is_dir()
        super().mkdir(mode, parents, exist_ok)
        above = self.parent / "cgroup.subtree_control"
        if not existed and above.exists():
            _fill(self, above.read_text().split())

    def write_text(self, data: str, *more: Any, **options: Any) -> int:
        if self.name == "cgroup.subtree_control":
            self._control(data.split())
        elif self.name == "cgroup.procs":
            self._enter(os.getpid() if data == "0" else int(data))
        elif not self.exists():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self))  # cgroupfs makes no files for anybody
        else:
            super().write_text(f"{data}\n")
        return len(data)

    def rmdir(self) -> None:
        busy = any(child.is_dir() for child in self.iterdir()) or (self / "cgroup.procs").read_text()
        if busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        for file in self.iterdir():
            file.unlink()
        super().rmdir()

    def _control(self, words: list[str]) -> None:
        directory = self.parent
        there = (directory / "cgroup.controllers").read_text().split()
        wanted = [word.removeprefix("+") for word in words]
        if any(name not in there for name in wanted):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        if (directory / "cgroup.procs").read_text() and (directory.parent / "cgroup.procs").exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        super().write_text(" ".join(dict.fromkeys([*self.read_text().split(), *wanted])) + "\n")
        for child in directory.iterdir():
            if child.is_dir():
                _fill(child, wanted)

    def _enter(self, pid: int) -> None:
        root = self.parent
        while (root.parent / "cgroup.procs").exists():
            root = root.parent
        for file in root.rglob("cgroup.procs"):
            put_processes(file.parent, *(one for one in processes(file.parent) if one != pid))
        put_processes(self.parent, *processes(self.parent), pid)


def _fill(directory: Path, controllers: list[str]) -> None:
    known = directory / "cgroup.controllers"
    names = [*(known.read_text().split() if known.exists() else ()), *controllers]
    for file, text in [("cgroup.subtree_control", ""), ("cgroup.procs", "")]:
        if not (directory / file).exists():
            (directory / file).touch()
            PosixPath(directory / file).write_text(text)
    PosixPath(known).write_text(" ".join(dict.fromkeys(names)) + "\n")
    for name in controllers:
        for file, text in FILES[name].items():
            PosixPath(directory / file).write_text(text)


def processes(directory: Path) -> list[int]:
    """Return who is in a group."""
    return [int(word) for word in PosixPath(directory / "cgroup.procs").read_text().split()]


def put_processes(directory: Path, *pids: int) -> None:
    """Have these in a group, and no others."""
    PosixPath(directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


def fake_cgroup2(directory: Path, controllers: tuple[str, ...] = ("cpu", "memory", "pids")) -> FakeCgroup2Path:
    """Make the root of a tree, with these controllers."""
    root = FakeCgroup2Path(directory)
    root.mkdir(exist_ok=True)
    for file, text in (("controllers", " ".join(controllers)), ("subtree_control", ""), ("procs", "")):
        PosixPath(root / f"cgroup.{file}").write_text(text)
    return root
