"""The store's arithmetic: whatever happens in whatever order, the sums are right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora.agent.ledger import Ledger

SIZES = {"d1": 10, "d2": 200, "d3": 3000}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("own", "disown", "hold", "unhold")), st.sampled_from("ab"), st.sampled_from(sorted(SIZES))
    ),
    max_size=60,
)


@given(STEPS)
def test_the_sums_are_those_of_what_is_owned(steps: list[tuple[str, str, str]]) -> None:
    ledger = Ledger()
    owned: set[tuple[str, str]] = set()
    holds: list[tuple[str, str]] = []
    for now, (step, tenant, digest) in enumerate(steps):
        if step == "own":
            ledger.own(tenant, digest, SIZES[digest], float(now))
            owned.add((tenant, digest))
        elif step == "disown":
            was_last = (tenant, digest) in owned and sum(name == digest for _owner, name in owned) == 1
            assert ledger.disown(tenant, digest) == was_last
            owned.discard((tenant, digest))
        elif step == "hold":
            ledger.hold(tenant, digest)
            holds.append((tenant, digest))
        elif (tenant, digest) in holds:
            holds.remove((tenant, digest))
            assert ledger.unhold(tenant, digest, float(now)) == ((tenant, digest) not in holds)
        assert ledger.total_bytes == sum(SIZES[name] for name in {name for _owner, name in owned})
        for owner in "ab":
            mine = {name for who, name in owned if who == owner}
            assert ledger.tenant_bytes[owner] == sum(SIZES[name] for name in mine)
            assert set(ledger.of_tenant(owner)) == mine
            assert ledger.count(owner) == len(mine)
        assert set(ledger.unheld()) == {name for _owner, name in owned} - {name for _owner, name in holds}


def test_the_least_recently_used_goes_first() -> None:
    ledger = Ledger()
    ledger.own("a", "d1", 1, 5.0)
    ledger.own("a", "d2", 1, 3.0)
    ledger.own("b", "d2", 1, 9.0)
    ledger.own("b", "d3", 1, 4.0)
    assert list(ledger.unheld()) == ["d3", "d1", "d2"]
    assert ledger.unused_since(4.5) == [("a", "d2"), ("b", "d3")]
