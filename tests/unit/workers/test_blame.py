"""Who ended shared workers: forgiven a few times, then kept out for a while, and forgotten."""

from __future__ import annotations

import pytest

from remora.errors import ResourceExhaustedError
from remora.workers.blame import FORGIVEN, MEMORY_S, Blame


def test_a_tenant_that_ends_worker_after_worker_is_kept_out_for_a_while() -> None:
    blame = Blame()
    for second in range(FORGIVEN):
        blame.check("evil", second)
        blame.note("evil", second)
    with pytest.raises(ResourceExhaustedError, match="come back in 590 s"):
        blame.check("evil", 10.0)
    blame.check("good", 10.0)
    blame.check("evil", MEMORY_S + 0.5)
    blame.note("evil", MEMORY_S + 1)
    with pytest.raises(ResourceExhaustedError):
        blame.check("evil", MEMORY_S + 0.5)


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    blame = Blame()
    for number in range(5000):
        for _ in range(FORGIVEN):
            blame.note(str(number), 0.0)
    blame.check("0", 1.0)
    with pytest.raises(ResourceExhaustedError):
        blame.check("4999", 1.0)
