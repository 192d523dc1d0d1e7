"""Each fault a few times; `python tests/e2e/faults.py 100` is the whole of it."""

from __future__ import annotations

import os

import pytest

import faults
from agent_process import catalogue_directory

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("name", faults.FAULTS)
def test_no_request_is_lost_answered_twice_or_wrongly_when(name: str) -> None:
    catalogue_directory()
    if os.geteuid() != 0:
        pytest.skip("a small file system cannot be mounted: root is missing")
    # A busy machine starts a handful of interpreters in its own time: the two seconds are for the program.
    found = faults.run([name], 2, restart_s=30.0)
    assert found["failures"] == []
    assert all(tally["answered"] == tally["sent"] > 0 for tally in found["load"])
