"""Shares of device time: weights, caps, priorities that starve nobody, and refusing early what must be late."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.agent.scheduler import FairScheduler
from remora.agent.tickets import Share, Ticket
from remora.errors import DeadlineExceededError, RemoraError


class Bench:
    """A lane with some slots; jobs end in the order in which they began."""

    def __init__(self, slots: int = 1) -> None:
        self.now_s = 0.0
        self.running: list[Ticket] = []
        self.used: Counter[str] = Counter()
        self.dropped: list[RemoraError] = []
        self.scheduler = FairScheduler(lambda _domain: slots, lambda: self.now_s, 1000)

    def submit(
        self, tenant: str, share: Share | None = None, deadline_s: float | None = None, model: str = "m"
    ) -> Ticket:
        ticket = Ticket(
            tenant,
            ("shared", model),
            lambda: self.running.append(ticket),
            self.dropped.append,
            deadline_s,
            share or Share(),
        )
        self.scheduler.submit(ticket)
        return ticket

    def finish(self, run_us: int = 5000) -> str:
        ticket = self.running.pop(0)
        self.now_s += run_us / 1e6
        self.used[ticket.tenant] += run_us
        self.scheduler.finished(ticket, run_us)
        return ticket.tenant


@pytest.mark.parametrize("weight", [1.0, 3.0])
@settings(deadline=None)
@given(costs=st.tuples(st.integers(2000, 20000), st.integers(2000, 20000)), slots=st.integers(1, 3))
def test_device_time_follows_weights(weight: float, costs: tuple[int, int], slots: int) -> None:
    bench = Bench(slots)
    cost = {"a": costs[0], "b": costs[1]}
    shares = {"a": Share(weight), "b": Share()}
    for _ in range(8):
        for tenant, share in shares.items():
            bench.submit(tenant, share, model="m")
    for _ in range(1500):
        tenant = bench.running[0].tenant
        bench.finish(cost[tenant])
        bench.submit(tenant, shares[tenant])
    assert bench.used["a"] / bench.used["b"] == pytest.approx(weight, rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 10), st.integers(2, 20))
def test_no_priority_starves_anyone(priority: int, depth: int) -> None:
    bench = Bench()
    first, last = Share(priority=priority), Share()
    for _ in range(depth):
        bench.submit("high", first)
        bench.submit("low", last)
    for _ in range(2000):
        tenant = bench.finish()
        bench.submit(tenant, first if tenant == "high" else last)
    head_start_us = priority * 50_000
    assert abs(bench.used["high"] - bench.used["low"]) <= head_start_us + 20_000


def test_a_priority_goes_first() -> None:
    bench = Bench()
    for _ in range(20):
        bench.submit("low")
    bench.finish()
    for _ in range(5):
        bench.submit("high", Share(priority=1))
    bench.finish()
    assert [bench.finish() for _ in range(5)] == ["high"] * 5


def test_nothing_waits_inside_the_worker_while_tenants_compete() -> None:
    bench = Bench(slots=3)
    for _ in range(10):
        bench.submit("flood")
    assert len(bench.running) == 3
    bench.finish()
    bench.submit("quiet")
    bench.finish()
    bench.finish()
    assert len(bench.running) == 2
    assert "quiet" in [ticket.tenant for ticket in bench.running]


def test_a_flood_of_one_model_does_not_delay_those_who_ask_for_another() -> None:
    bench = Bench()
    for _ in range(100):
        bench.submit("flood", model="a")
    for _ in range(20):
        bench.finish(10_000)
    bench.submit("new", model="b")
    assert "new" in [bench.finish(10_000) for _ in range(2)]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_device_time_follows_weights_between_models_too(weight: float) -> None:
    bench = Bench(slots=2)
    shares = {"a": ("one", Share(weight), 2_000), "b": ("two", Share(), 9_000)}
    for _ in range(8):
        for tenant, (model, share, _cost) in shares.items():
            bench.submit(tenant, share, model=model)
    for _ in range(3000):
        tenant = bench.running[0].tenant
        model, share, cost = shares[tenant]
        bench.finish(cost)
        bench.submit(tenant, share, model=model)
    assert bench.used["a"] / bench.used["b"] == pytest.approx(weight, rel=0.05)


def test_a_cap_holds_and_lets_others_pass() -> None:
    bench = Bench(slots=3)
    for _ in range(5):
        bench.submit("capped", Share(concurrent=1))
    bench.submit("other")
    assert sorted(ticket.tenant for ticket in bench.running) == ["capped", "other"]
    for _ in range(6):
        bench.finish()
    assert not bench.running
    assert not bench.scheduler.waiting


def test_what_must_be_late_is_refused_at_once_and_an_old_estimate_refuses_nobody() -> None:
    bench = Bench()
    for _ in range(5):
        bench.submit("a")
        bench.finish(500_000)
    with pytest.raises(DeadlineExceededError, match="too late"):
        bench.submit("a", deadline_s=bench.now_s + 0.1)
    bench.submit("a", deadline_s=bench.now_s + 2)
    bench.finish(500_000)
    bench.now_s += 10
    bench.submit("a", deadline_s=bench.now_s + 0.1)


_STEP = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from("abc"), st.integers(0, 2)),
    st.tuples(st.just("finish"), st.integers(0, 90_000), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0)),
)


@settings(deadline=None)
@given(st.lists(_STEP, max_size=80), st.integers(1, 3))
def test_with_caps_and_cancelling_anywhere_every_request_ends_once(
    steps: list[tuple[str, str | int, int]], slots: int
) -> None:
    bench = Bench(slots)
    tickets: list[Ticket] = []
    cancelled = ended = 0
    for name, value, cap in steps:
        if name == "submit":
            tickets.append(bench.submit(str(value), Share(concurrent=cap, priority=cap, weight=1 + cap)))
        elif name == "finish" and bench.running:
            bench.finish(int(value))
            ended += 1
        elif name == "cancel" and tickets:
            cancelled += bench.scheduler.cancel(tickets[int(value) % len(tickets)])
        assert len(bench.running) <= slots
    while bench.running:
        bench.finish()
        ended += 1
    assert ended + cancelled == len(tickets)
    assert not bench.scheduler.waiting
    assert not bench.scheduler._capped
