"""How long work in this room tells what it is doing; the commands turn it into lines or bars."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with a step's name, what is done of it, and the whole, in one unit (0: the whole is not known)."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """A `Progress` that tells nothing."""
