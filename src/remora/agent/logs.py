"""The agent's log: one line per event, as text for people or JSON for machines, on stderr.

A reader that stops reading must not stop the agent, and a guest that sends nonsense all day must not fill a disk: lines
are written by a thread, what does not fit its queue is counted and dropped, and each tenant has a budget of lines.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

_QUEUE_LENGTH = 4096
#: Lines a tenant may cause at once, and per second in the long run.
_BURST = 50
_PER_SECOND = 5.0
_MAX_VALUE = 500
#: A tenant who caused no line for this long is told of by `Log.sweep`.
_QUIET_S = 5.0

Value = str | int | float | bool | None


class _Budget:
    __slots__ = ("at_s", "left", "suppressed")

    def __init__(self, now_s: float) -> None:
        self.at_s = now_s
        self.left = float(_BURST)
        self.suppressed = 0

    def take(self, now_s: float) -> bool:
        self.left = min(float(_BURST), self.left + (now_s - self.at_s) * _PER_SECOND)
        self.at_s = now_s
        if self.left < 1:
            self.suppressed += 1
            return False
        self.left -= 1
        return True


def _plain(value: Value) -> Value:
    """Guests' strings end up here: no control characters, no endless lines."""
    if isinstance(value, str):
        text = value if len(value) <= _MAX_VALUE else value[:_MAX_VALUE] + "..."
        return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
    return value


def as_text(level: str, event: str, fields: dict[str, Value], when: datetime) -> str:
    words = []
    for key, value in fields.items():
        shown = str(value)
        quoted = json.dumps(shown, ensure_ascii=False) if " " in shown or '"' in shown or not shown else shown
        words.append(f"{key}={quoted}")
    return " ".join((when.isoformat(timespec="milliseconds"), level, event, *words))


def as_json(level: str, event: str, fields: dict[str, Value], when: datetime) -> str:
    entry = {"time": when.isoformat(timespec="milliseconds"), "level": level, "event": event, **fields}
    return json.dumps(entry, ensure_ascii=False)


class Log:
    """Writes lines to a file descriptor from a thread of its own."""

    def __init__(self, fd: int = 2, *, json_lines: bool = False) -> None:
        self._fd = fd
        self._format: Callable[[str, str, dict[str, Value], datetime], str] = as_json if json_lines else as_text
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE_LENGTH)
        #: By tenant and level: sessions that come and go must not crowd out refusals.
        self._budgets: dict[tuple[str, str], _Budget] = {}
        self._silenced: set[tuple[str, str]] = set()
        #: Lines that were lost, and lines that tenants had no budget for.
        self.dropped = 0
        self.suppressed = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def info(self, event: str, **fields: Value) -> None:
        self._put("info", event, fields)

    def error(self, event: str, **fields: Value) -> None:
        self._put("error", event, fields)

    def of_tenant(self, tenant: str, event: str, *, level: str = "warning", **fields: Value) -> None:
        """Write a line that a tenant caused, if its budget allows."""
        now_s = time.monotonic()
        budget = self._budgets.get((tenant, level))
        if budget is None:
            if len(self._budgets) > 10_000:  # they all have a full budget by the time this is reached again
                self._budgets.clear()
            budget = self._budgets[tenant, level] = _Budget(now_s)
        if not budget.take(now_s):
            self.suppressed += 1
            self._silenced.add((tenant, level))
            return
        if budget.suppressed:
            fields["suppressed_before"] = budget.suppressed
            budget.suppressed = 0
        self._put(level, event, {"tenant": tenant, **fields})

    def sweep(self) -> None:
        """Say what was left out for tenants who have since been quiet; called now and then."""
        now_s = time.monotonic()
        for tenant, level in list(self._silenced):
            budget = self._budgets.get((tenant, level))
            if budget is None or not budget.suppressed:
                self._silenced.discard((tenant, level))
            elif now_s - budget.at_s > _QUIET_S:
                self._put(level, "lines left out", {"tenant": tenant, "suppressed_before": budget.suppressed})
                budget.suppressed = 0

    def close(self) -> None:
        """Write what waits, for at most two seconds: the reader may be gone."""
        try:
            self._queue.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(timeout=2)

    def _put(self, level: str, event: str, fields: dict[str, Value]) -> None:
        shown = {key: _plain(value) for key, value in fields.items()}
        try:
            self._queue.put_nowait(self._format(level, event, shown, datetime.now(UTC)))
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except OSError:  # the reader is gone; there is nobody left to tell
                    self.dropped += 1
                    break
