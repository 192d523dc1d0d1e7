"""The kept cases of each target: files named by their digest, so that the same case is never kept twice."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
#: Files whose lines count as covered.
_OURS = ("/remora/", "/h2/", "/hpack/", "/hyperframe/")


def read(target: str) -> list[bytes]:
    """Return the kept cases, the shortest first."""
    return sorted((path.read_bytes() for path in (CORPUS / target).glob("*")), key=lambda data: (len(data), data))


def replace(target: str, cases: Iterable[bytes]) -> None:
    """Keep these cases and no others."""
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    wanted = {hashlib.sha256(data).hexdigest()[:16]: data for data in cases}
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, data in wanted.items():
        (directory / name).write_bytes(data)


def covered(case: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """Return the steps from line to line that a case takes through our code."""
    steps: set[tuple[str, int, int]] = set()
    last: dict[str, int] = {}

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        # Any: sys.settrace's own type.
        name = frame.f_code.co_filename
        if not any(part in name for part in _OURS):
            return None
        if event == "line":
            steps.add((name, last.get(name, 0), frame.f_lineno))
            last[name] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        case(data)
    finally:
        sys.settrace(None)
    return steps


def minimal(case: Callable[[bytes], None], cases: Iterable[bytes]) -> list[bytes]:
    """Return those cases, short ones first, that take a step which none before them took."""
    known: set[tuple[str, int, int]] = set()
    kept = []
    for data in sorted(set(cases), key=lambda data: (len(data), data)):
        steps = covered(case, data)
        if not steps <= known:
            known |= steps
            kept.append(data)
    return kept
