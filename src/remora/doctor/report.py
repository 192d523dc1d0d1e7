"""One finding of `remora doctor`, and the order of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

#: `ok`: works. `note`: works less well, or a part that not everybody needs is missing. `bad`: a main part cannot work.
State = Literal["ok", "note", "bad"]


class Finding(NamedTuple):
    """What was found about one thing; `fix` says what to do about it, if anything."""

    area: str
    name: str
    state: State
    detail: str
    fix: str = ""


class Check(NamedTuple):
    """One part of the examination: what it looks at, for the progress line, and how."""

    title: str
    run: Callable[[], Iterator[Finding]]


def worst(findings: list[Finding]) -> State:
    """Return the worst state among them."""
    states = {finding.state for finding in findings}
    return "bad" if "bad" in states else "note" if "note" in states else "ok"
