"""`Config` and `bootstrap`: here for programs that call them. There is no library to set up and no plugin to load.

What vaccel-python configures with them (plugins, logging, profiling) belongs to the agent in Remora; the address of the
agent is `VACCEL_RPC_ADDRESS`.
"""

from __future__ import annotations

import os

from remora.vaccel import link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional


class Config:
    """Values as vaccel-python's `Config` takes them; read-only."""

    __slots__ = ("_plugins", "_log_level", "_log_file", "_profiling_enabled", "_version_ignore")

    def __init__(
        self,
        plugins: Optional[str] = None,
        log_level: int = 1,
        log_file: Optional[str] = None,
        *,
        profiling_enabled: bool = False,
        version_ignore: bool = False,
    ) -> None:
        self._plugins = plugins if plugins is not None else os.environ.get("VACCEL_PLUGINS", "libvaccel-noop.so")
        self._log_level = log_level
        self._log_file = log_file
        self._profiling_enabled = profiling_enabled
        self._version_ignore = version_ignore

    @property
    def plugins(self) -> str:
        return self._plugins

    @property
    def log_level(self) -> int:
        return self._log_level

    @property
    def log_file(self) -> Optional[str]:
        return self._log_file

    @property
    def profiling_enabled(self) -> bool:
        return self._profiling_enabled

    @property
    def version_ignore(self) -> bool:
        return self._version_ignore


def bootstrap(config: Optional[Config] = None) -> None:
    """Nothing is needed: the first session connects. Kept so that programs that call it go on working."""


def cleanup() -> None:
    """Close the connection to the agent. The next session makes a new one."""
    link.close()
