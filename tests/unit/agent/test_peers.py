"""Bytes in flight: of a tenant, of all, and the shares of those who come when there is little room."""

from __future__ import annotations

import pytest

from fake_workers import FakeWorkers
from remora.agent.identity import Identity
from remora.agent.peers import Peer, Peers
from remora.agent.policy import Limits
from remora.errors import ResourceExhaustedError


def peers(**limits: int) -> Peers:
    workers = FakeWorkers(arena_bytes=1 << 30)
    return Peers(Limits(**limits), workers.allocate, lambda _tenant: False, lambda _peer: None)


def test_a_tenant_may_not_have_more_in_flight_than_its_limit() -> None:
    found = peers(in_flight_bytes_per_tenant=100)
    block = found.allocate("a", 60)
    with pytest.raises(ResourceExhaustedError, match="in_flight_bytes_per_tenant"):
        found.allocate("a", 41)
    with pytest.raises(ResourceExhaustedError, match="in_flight_bytes_per_tenant"):
        found.hold("a", 41)
    block.release()
    sent = found.hold("a", 100)
    sent()
    assert not found.in_flight_bytes


def test_many_tenants_together_cannot_fill_the_machine_and_each_keeps_a_share() -> None:
    found = peers(in_flight_bytes_per_tenant=100, in_flight_bytes=400)
    for name in ("a", "b"):
        found.allocate(name, 100)
    with pytest.raises(ResourceExhaustedError, match=r"limits\.in_flight_bytes\).*try again"):
        found.allocate("c", 90)  # more than a third of half
    for name in ("c", "d", "e", "f"):
        found.allocate(name, 30)
    with pytest.raises(ResourceExhaustedError, match=r"limits\.in_flight_bytes"):
        found.allocate("a", 1)
    with pytest.raises(ResourceExhaustedError):
        take_what_there_is(found)
    assert sum(found.in_flight_bytes.values()) <= 400


def join(found: Peers, tenant: str, count: int) -> list[Peer]:
    """Connect so often, as far as there is room."""
    identity, joined = Identity(f"sandbox:{tenant}", tenant), []
    for _ in range(count):
        try:
            found.check_room(identity)
        except ResourceExhaustedError:
            break
        joined.append(found.join(identity))
    return joined


def test_whoever_takes_all_the_connections_it_can_leaves_some_to_others() -> None:
    found = peers(connections=64, connections_per_tenant=1000)
    assert len(join(found, "greedy", 1000)) == 56
    with pytest.raises(ResourceExhaustedError, match=r"this tenant 56 \(limits\.connections\).*try again"):
        found.check_room(Identity("sandbox:greedy", "greedy"))
    first = join(found, "b", 1000)
    assert len(first) == 4, "half of what is kept back, as there are two of them"
    assert [len(join(found, name, 1000)) for name in "cde"] == [2, 2, 0]
    for peer in first:
        found.leave(peer)
    assert len(join(found, "f", 1)) == 1


def take_what_there_is(found: Peers) -> None:
    for number in range(1000):
        found.allocate(f"more{number}", 5)
