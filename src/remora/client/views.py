"""What a session and a model say of themselves: the same for the blocking ones and those of asyncio."""

from __future__ import annotations

from remora.client.calls import Loaded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Sequence

    from remora.client.values import ModelInfo, TensorSpec


class SessionView:
    """A session's own side of `Session` and `AsyncSession`."""

    _link: Any  # Link or AsyncLink
    _loaded: Dict[str, Loaded]

    def __repr__(self) -> str:
        return f"<remora.{type(self).__name__} {self.id} at {self.address}>"

    @property
    def id(self) -> str:
        """Public name of the session, as the agent's log has it. It changes when the microVM is cloned."""
        name: str = self._link.continuity.session_id
        return name

    @property
    def address(self) -> str:
        url: str = self._link.address.url
        return url

    @property
    def agent(self) -> str:
        """Name and version of the agent."""
        name: str = self._link.continuity.agent
        return name

    @property
    def operations(self) -> Sequence[str]:
        """Names of the operations that policy allows here."""
        names: Sequence[str] = self._link.continuity.operations
        return names


class ModelView:
    """A model's own side of `Model` and `AsyncModel`."""

    info: ModelInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        return self.info.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        return self.info.outputs

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<remora.{type(self).__name__} {self.name}>"
