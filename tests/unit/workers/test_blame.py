"""Who ended shared workers: forgiven a few times, then kept out for a while, and forgotten."""

from __future__ import annotations

from remora.workers.blame import FORGIVEN, MEMORY_S, Blame


def test_a_tenant_that_ends_worker_after_worker_is_kept_out_for_a_while() -> None:
    blame = Blame()
    for second in range(FORGIVEN):
        assert blame.refusal("evil", second) is None
        blame.note("evil", second)
    assert "come back in 590 s" in str(blame.refusal("evil", 10.0))
    assert blame.refusal("good", 10.0) is None
    assert blame.refusal("evil", MEMORY_S + 0.5) is None
    blame.note("evil", MEMORY_S + 0.6)
    assert blame.refusal("evil", MEMORY_S + 0.7) is not None, "the two others are not so long ago"


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    blame = Blame()
    for number in range(5000):
        for _ in range(FORGIVEN):
            blame.note(str(number), 0.0)
    assert blame.refusal("0", 1.0) is None
    assert blame.refusal("4999", 1.0) is not None
