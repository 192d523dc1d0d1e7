"""A new policy without a new agent: SIGHUP reads the configuration file again, or refuses it and keeps the old one.

Only the rules for tenants change while requests are under way: each request goes by the rules it began under. The
sections about the node itself ([limits], [store], [workers], [fleets]) say what exists already, and take a restart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from remora.agent import policy
from remora.agent.core import Core
from remora.agent.policy import Policy
from remora.errors import RemoraError
from remora.reactor import Reactor

#: A ConfigMap's change takes the kubelet a minute; one look is a system call for each file.
LOOK_S = 2.0


class Reloading:
    """Knows where the policy came from."""

    def __init__(self, core: Core, path: Path | None, started_with: Policy) -> None:
        self._core = core
        self._path = path
        self._started_with = started_with
        if path is not None:
            try:
                core.policy_source = (str(path), policy.read(path), "")
            except RemoraError as error:  # it was readable a moment ago
                core.policy_source = (str(path), "", str(error))

    def _refuse(self, path: Path, reason: str) -> None:
        file, known, _refused = self._core.policy_source
        self._core.policy_source = (file, known, reason)
        self._core.log.error("policy refused, the old one stays", file=str(path), error=reason)

    def reload(self) -> None:
        """Go by the file as it is now."""
        core, path = self._core, self._path
        if path is None:
            core.log.info("policy not reloaded", reason="the agent was started without --config")
            return
        try:
            text = policy.read(path)
            read = policy.parse(text, str(path))
        except RemoraError as error:
            self._refuse(path, str(error))
            return
        core.quotas.replace(read.rules)
        core.policy_source = (str(path), text, "")
        old = self._started_with
        restart = [
            name for name in ("limits", "store", "workers", "fleets") if getattr(read, name) != getattr(old, name)
        ]
        core.log.info("policy reloaded", file=str(path), takes_a_restart=" ".join(restart))


def watch(reactor: Reactor, files: Sequence[Path], changed: Callable[[], None]) -> None:
    """Call `changed` soon after one of the files is another one, as a kubelet exchanges those of a volume."""
    seen = [_mark(path) for path in files]

    def look() -> None:
        nonlocal seen
        now = [_mark(path) for path in files]
        if now != seen:
            seen = now
            changed()
        reactor.call_later(LOOK_S, look)

    reactor.call_later(LOOK_S, look)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
