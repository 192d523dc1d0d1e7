"""For every run of tests: what earlier ones have left, because they were killed, goes."""

from __future__ import annotations

import pytest

import run_leftovers


def pytest_sessionstart(session: pytest.Session) -> None:
    run_leftovers.mark_children()
    if swept := run_leftovers.sweep():
        session.config.stash[_SWEPT] = swept


def pytest_report_header(config: pytest.Config) -> list[str]:
    swept = config.stash.get(_SWEPT, [])
    return [f"left by runs that were killed, removed now: {len(swept)} ({', '.join(swept[:3])}, ...)"] if swept else []


_SWEPT = pytest.StashKey[list[str]]()
