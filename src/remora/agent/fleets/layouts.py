"""Where others' microVMs have their vsock: Kata's directories, and those of an operator's own monitors.

Only names are read here, from directories that come and go at any moment; nothing is followed or trusted yet.
Source of Kata's paths: src/runtime/virtcontainers and src/runtime-rs/crates/hypervisor of kata-containers 2 to 4.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from remora.agent.fleets import shims
from remora.agent.fleets.bundles import SHORT_ID
from remora.errors import InvalidArgumentError, RemoraError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
#: Ids of CRI sandboxes are 64 hexadecimal digits; other clients of containerd choose theirs.
_SHORT = re.compile(rf"[a-zA-Z0-9][a-zA-Z0-9_.-]{{0,{SHORT_ID - 1}}}")
_MONITOR = "shim-monitor.sock"
#: How soon a shim that did not answer, or did not know, is asked again: twice as late each time, up to the second.
_ASK_AGAIN_S, _ASK_AT_LAST_S = 1.0, 30.0
#: No look at all fleets waits longer than this, and one answer, for shims.
_ASKING_S = 1.0
_MOST_KEPT = 16384
FORMS = "write kata, kata:/prefix, or firecracker:/srv/fc/*/v.sock"


@dataclass(frozen=True, slots=True)
class Place:
    """A sandbox's vsock: a hybrid socket, or a CID."""

    fleet: str
    #: Its id, or its beginning.
    id: str
    #: It ends when this goes.
    directory: Path
    socket: Path | None = None
    cid: int = 0
    short: bool = False


def _directories(path: str | Path) -> list[str]:
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

    name = "kata"
    #: Its sandboxes are containerd's.
    by_containerd = True

    def __init__(self, prefix: Path = Path("/")) -> None:
        self._go = prefix / "run/vc"
        self._rust = prefix / "run/kata"
        #: Made once: a look at a thousand sandboxes would spend most of its time on paths.
        self._places: dict[tuple[str, str], Place] = {}
        #: What shims said; when the others may be asked again, and how long that was put off.
        self._said: dict[str, tuple[Path | None, int]] = {}
        self._ask_s: dict[str, tuple[float, float]] = {}
        self.text = "kata" if prefix == Path("/") else f"kata:{prefix}"

    def places(self) -> Iterator[Place]:
        """Yield the sandboxes whose hybrid socket is where it usually is: a monitor makes it before it boots."""
        for sandbox, path, short in self._possible():
            if os.path.lexists(path):
                yield self._place(sandbox, path, short=short)

    def _possible(self) -> Iterator[tuple[str, str, bool]]:
        """Yield an id, a path, and whether the id is only the beginning of one."""
        # The Go runtime: vm/<id>/clh.sock, <name of firecracker's binary>/<32 of id>/root/kata.hvsock.
        for name in _directories(self._go):
            if name == "vm":
                for sandbox in _directories(f"{self._go}/vm"):
                    yield sandbox, f"{self._go}/vm/{sandbox}/clh.sock", False
            elif name != "sbs":
                for sandbox in _directories(f"{self._go}/{name}"):
                    if _SHORT.fullmatch(sandbox):
                        yield sandbox, f"{self._go}/{name}/{sandbox}/root/kata.hvsock", True
        # The Rust runtime: Firecracker, Cloud Hypervisor, Dragonball, OpenVMM; then the jailed Firecracker.
        for sandbox in _directories(self._rust):
            for file in ("kata.hvsock", "ch-vm.sock", "root/kata.hvsock", "vsock.sock"):
                yield sandbox, f"{self._rust}/{sandbox}/{file}", False
        for sandbox in _directories(f"{self._rust}/firecracker"):
            yield sandbox, f"{self._rust}/firecracker/{sandbox}/root/kata.hvsock", False

    def _place(self, sandbox: str, path: str, *, short: bool = False) -> Place:
        known = self._places.get((sandbox, path))
        if known is None:
            if len(self._places) > _MOST_KEPT:
                self._places.clear()
            known = Place(self.name, sandbox, Path(path).parent, Path(path), short=short)
            self._places[sandbox, path] = known
        return known

    def others(self, known: Set[str]) -> Iterator[Place]:
        """Yield the sandboxes that their shims tell of, or QEMU's command line, and that are not known by then.

        That are QEMU's, and those whose monitor was made before the sandbox (templates, cached VMs).
        """
        managed = self._managed()
        self._said = {sandbox: said for sandbox, said in self._said.items() if sandbox in managed}
        self._ask_s = {sandbox: asked for sandbox, asked in self._ask_s.items() if sandbox in managed}
        until_s = time.monotonic() + _ASKING_S
        # Who has waited longest comes first: those that hang must not keep the others from being asked.
        for sandbox in sorted(managed, key=lambda name: self._ask_s.get(name, (0.0, 0.0))):
            path = managed[sandbox]
            if sandbox not in known:
                where, cid = self._ask(sandbox, path, until_s)
                if where is not None and os.path.lexists(where):
                    yield self._place(sandbox, str(where))
                elif cid:
                    yield self._of_cid(sandbox, cid, path.parent)
        for sandbox in _directories(self._go / "vm"):
            if sandbox not in known and sandbox not in self._said:
                cid = shims.cid_of_monitor(self._go / "vm" / sandbox / "pid", sandbox)
                if cid:
                    yield self._of_cid(sandbox, cid, self._go / "vm" / sandbox)

    def _of_cid(self, sandbox: str, cid: int, directory: Path) -> Place:
        # The monitor's directory where there is one, so that it is the same place whoever told of it.
        monitors = self._go / "vm" / sandbox
        return Place(self.name, sandbox, monitors if monitors.is_dir() else directory, cid=cid)

    def _managed(self) -> dict[str, Path]:
        """Return the management sockets of the shims, by sandbox id."""
        found = {}
        for parent in (self._go / "sbs", self._rust):
            for sandbox in _directories(parent):
                path = f"{parent}/{sandbox}/{_MONITOR}"
                if os.path.lexists(path):
                    found[sandbox] = Path(path)
        return found

    def _ask(self, sandbox: str, path: Path, until_s: float) -> tuple[Path | None, int]:
        said = self._said.get(sandbox, (None, 0))
        now_s = time.monotonic()
        when_s, delay_s = self._ask_s.get(sandbox, (0.0, _ASK_AGAIN_S))
        if said == (None, 0) and when_s <= now_s < until_s:
            try:
                said = shims.parse_agent_url(shims.agent_url(path))
            except (OSError, RemoraError):
                pass  # not up yet, or hung: asked again
            if said == (None, 0):
                self._ask_s[sandbox] = time.monotonic() + delay_s, min(2 * delay_s, _ASK_AT_LAST_S)
            else:
                self._said[sandbox] = said
        return said


class Glob:
    """Directories of an operator's own monitors: one part of the path has wildcards, and names the sandbox."""

    name = "firecracker"
    by_containerd = False

    def __init__(self, pattern: str) -> None:
        """
        Raises:
            InvalidArgumentError: not such a pattern.
        """
        parts = Path(pattern).parts
        wild = [index for index, part in enumerate(parts) if any(char in part for char in "*?[")]
        if not pattern.startswith("/") or ".." in parts or len(wild) != 1 or wild[0] == len(parts) - 1:
            raise InvalidArgumentError(
                f"{pattern!r} does not say where microVMs have their vsock sockets",
                fix="give an absolute path with wildcards in one directory's name, such as /srv/fc/*/v.sock",
            )
        # The operator's own part may have symlinks; below it nothing is followed.
        self._parent = Path(os.path.realpath(Path(*parts[: wild[0]])))
        self._wild = parts[wild[0]]
        self._rest = Path(*parts[wild[0] + 1 :])
        self.text = f"firecracker:{pattern}"

    def places(self) -> Iterator[Place]:
        """Yield the sockets whose directory exists, so that the agent listens before the microVM boots."""
        for sandbox in _directories(self._parent):
            if not fnmatchcase(sandbox, self._wild):
                continue
            path = self._parent / sandbox / self._rest
            if path.parent.is_dir():
                yield Place(self.name, sandbox, path.parent, path)

    def others(self, _known: Set[str]) -> Iterator[Place]:
        """There is nobody to ask."""
        return iter(())


Fleet = Kata | Glob


def parse_fleet(text: str) -> Fleet:
    """Read what `--attach` takes: `kata[:PREFIX]` or `firecracker:GLOB`.

    Raises:
        InvalidArgumentError: neither.
    """
    kind, colon, rest = text.partition(":")
    if kind == "kata" and (not colon or (rest.startswith("/") and ".." not in Path(rest).parts)):
        return Kata(Path(os.path.realpath(rest or "/")))
    if kind == "firecracker" and colon:
        return Glob(rest)
    raise InvalidArgumentError(f"{text!r} is no fleet that the agent could find", fix=FORMS)
