"""Shows on stderr what long work is doing: one line that renews itself on a terminal, a line per step elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_BAR = 24
_RENEW_S = 0.1


class Reporter:
    """Use as a context manager; `bytes`, `steps` and `fraction` are what the rooms below call."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stderr
        self._live = self._out.isatty()
        self._step = ""
        self._shown_at = 0.0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def bytes(self, step: str, done: int, total: int) -> None:
        """Progress in bytes; a total of 0 is one that nobody knows."""
        self._show(step, done / total if total else None, f"{done / 1e6:.0f}/{total / 1e6:.0f} MB" if total else "")

    def steps(self, step: str, done: int, total: int) -> None:
        """Progress in steps."""
        self._show(step, done / total if total else None, "")

    def fraction(self, step: str, done: float) -> None:
        """Progress as a fraction of 1."""
        self._show(step, done, "")

    def _show(self, step: str, done: float | None, amount: str) -> None:
        if not self._live:
            if step != self._step:
                print(step, file=self._out, flush=True)
            self._step = step
            return
        now = time.monotonic()
        if step == self._step and now - self._shown_at < _RENEW_S:
            return
        self._step, self._shown_at = step, now
        filled = round(_BAR * min(done, 1.0)) if done is not None else 0
        bar = f"[{'#' * filled:<{_BAR}}] " if done is not None else ""
        line = f"{bar}{step}  {amount}".rstrip()
        self._out.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
        self._out.flush()
