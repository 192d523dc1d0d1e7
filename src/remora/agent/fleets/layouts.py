"""Where others' microVMs have their vsock sockets: Kata's directories, and those of an operator's own Firecrackers.

Only names are read here, from directories that come and go at any moment; nothing is opened, followed or trusted yet.
Source of Kata's paths: src/runtime/virtcontainers and src/runtime-rs/crates/hypervisor of kata-containers 2 to 4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from remora.errors import InvalidArgumentError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
#: Ids of CRI sandboxes are 64 hexadecimal digits; other clients of containerd choose theirs.
_SHORT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,31}")
_SHIM = "shim-monitor.sock"


@dataclass(frozen=True, slots=True)
class Place:
    """A sandbox's socket: by its id, or the first 32 characters of it."""

    sandbox: str
    socket: Path


def _directories(path: Path) -> list[str]:
    """Return the names of the directories in one, without those that no sandbox can have."""
    try:
        with os.scandir(path) as entries:
            return sorted(
                entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except OSError:
        return []


class Kata:
    """The run-time directories of Kata, below a prefix where its monitors run without root."""

    def __init__(self, prefix: Path = Path("/")) -> None:
        self._go = prefix / "run/vc"
        self._rust = prefix / "run/kata"

    def places(self) -> Iterator[Place]:
        """Yield the hybrid sockets that exist: the monitor makes its own before it boots the guest."""
        for place in self._possible():
            if os.path.lexists(place.socket):
                yield place

    def _possible(self) -> Iterator[Place]:
        # The Go runtime: vm/<id>/clh.sock, <name of firecracker's binary>/<32 of id>/root/kata.hvsock.
        for name in _directories(self._go):
            below = self._go / name
            if name == "vm":
                for sandbox in _directories(below):
                    yield Place(sandbox, below / sandbox / "clh.sock")
            elif name != "sbs":
                for sandbox in _directories(below):
                    if _SHORT.fullmatch(sandbox):
                        yield Place(sandbox, below / sandbox / "root/kata.hvsock")
        # The Rust runtime: Firecracker, Cloud Hypervisor, Dragonball, OpenVMM; then the jailed Firecracker.
        for sandbox in _directories(self._rust):
            for name in ("kata.hvsock", "ch-vm.sock", "root/kata.hvsock", "vsock.sock"):
                yield Place(sandbox, self._rust / sandbox / name)
        for sandbox in _directories(self._rust / "firecracker"):
            yield Place(sandbox, self._rust / "firecracker" / sandbox / "root/kata.hvsock")

    def shims(self) -> dict[str, Path]:
        """Return the management sockets of the shims, by sandbox id."""
        found = {}
        for parent in (self._go / "sbs", self._rust):
            for sandbox in _directories(parent):
                path = parent / sandbox / _SHIM
                if os.path.lexists(path):
                    found[sandbox] = path
        return found


class Glob:
    """Directories of an operator's own monitors: one part of the path has wildcards, and names the sandbox."""

    def __init__(self, pattern: str) -> None:
        """
        Raises:
            InvalidArgumentError: not such a pattern.
        """
        parts = Path(pattern).parts
        wild = [index for index, part in enumerate(parts) if any(char in part for char in "*?[")]
        if not pattern.startswith("/") or ".." in parts or len(wild) != 1 or wild[0] == len(parts) - 1:
            raise InvalidArgumentError(
                f"{pattern!r} does not say where sandboxes have their sockets",
                fix="give an absolute path with wildcards in one directory's name, such as /srv/fc/*/v.sock",
            )
        # The operator's own part may have symlinks; below it nothing is followed.
        self._parent = Path(os.path.realpath(Path(*parts[: wild[0]])))
        self._wild = parts[wild[0]]
        self._rest = Path(*parts[wild[0] + 1 :])

    def places(self) -> Iterator[Place]:
        """Yield the sockets whose directory exists, so that the agent listens before the microVM boots."""
        for sandbox in _directories(self._parent):
            path = self._parent / sandbox / self._rest
            if fnmatchcase(sandbox, self._wild) and os.path.isdir(path.parent):
                yield Place(sandbox, path)
