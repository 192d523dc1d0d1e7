"""A new policy without a new agent: SIGHUP reads the configuration file again, or refuses it and keeps the old one.

Only the rules for tenants change while requests are under way: each request goes by the rules it began under. The
sections about the node itself ([limits], [store], [workers]) size what exists already, and take a restart.
"""

from __future__ import annotations

from pathlib import Path

from remora.agent import policy
from remora.agent.core import Core
from remora.agent.policy import Policy
from remora.errors import RemoraError


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
        restart = [name for name in ("limits", "store", "workers") if getattr(read, name) != getattr(old, name)]
        core.log.info("policy reloaded", file=str(path), takes_a_restart=" ".join(restart))
