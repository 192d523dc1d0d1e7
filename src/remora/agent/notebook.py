"""What was measured of models, kept between starts: one JSON file in the state directory.

It holds nothing that could not be measured again: a file that is damaged or from another version is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora.agent.disk import DiskPool
from remora.workers.contract import Measurement

_VERSION = 2
_MOST = 4096
#: Of one tenant's uploads; it may replace them by others all day.
_MOST_OWN = 256
_MOST_BYTES = 8 << 20


@dataclass(frozen=True)
class Facts:
    """Of one model, on one device, by one version of its backend."""

    digest: str
    #: None: not measured yet, or it does not run on samples.
    measurement: Measurement | None = None
    #: It was measured, or was found not to run on samples.
    tried: bool = False
    memory_bytes: int = 0
    load_s: float = 0.0


class Notebook:
    """Facts by key; those of catalogue models are written down, those of uploads end with their tenant's worker."""

    def __init__(self, path: Path, disk: DiskPool) -> None:
        self._path = path
        self._disk = disk
        self._kept: dict[str, Facts] = _read(path)
        self._own: dict[str, dict[str, Facts]] = {}

    def get(self, domain: str, key: str, *, kept: bool) -> Facts | None:
        return (self._kept if kept else self._own.get(domain, {})).get(key)

    def put(self, domain: str, key: str, facts: Facts, *, kept: bool) -> None:
        table = self._kept if kept else self._own.setdefault(domain, {})
        table.pop(key, None)
        table[key] = facts  # the newest last
        while len(table) > (_MOST if kept else _MOST_OWN):
            del table[next(iter(table))]
        if not kept:
            return
        data = json.dumps({"version": _VERSION, "models": {key: asdict(one) for key, one in self._kept.items()}})
        self._disk.insist("notebook", lambda: _write(self._path, data.encode()))

    def memory_bytes(self, domain: str, digest: str, *, kept: bool) -> int:
        """Return what a model took when it was last loaded, on whatever device; 0 if it never was."""
        table = self._kept if kept else self._own.get(domain, {})
        return max((facts.memory_bytes for facts in table.values() if facts.digest == digest), default=0)

    def forget(self, domain: str) -> None:
        self._own.pop(domain, None)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".new")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path) -> dict[str, Facts]:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        with path.open("rb") as file:
            document = json.loads(file.read(_MOST_BYTES))
        if document["version"] == _VERSION:
            return {str(key): _facts(one) for key, one in document["models"].items()}
    return {}


def _facts(values: dict[str, Any]) -> Facts:
    measured = values["measurement"]
    measurement = None
    if measured is not None:
        measurement = Measurement(
            {int(rows): float(run_us) for rows, run_us in measured["curve"].items()},
            {int(count): float(rate) for count, rate in measured["threads"].items()},
            measured["independent"] is True,
            int(measured["memory_bytes"]),
        )
    return Facts(
        str(values["digest"]),
        measurement,
        values["tried"] is True,
        int(values["memory_bytes"]),
        float(values["load_s"]),
    )
