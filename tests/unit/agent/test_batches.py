"""Requests that run as one: who is joined, who is not, who pays, and what it may cost the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.agent.runtimes import RunTimes
from remora.agent.scheduler import FairScheduler
from remora.agent.tickets import Plan, Share, Ticket
from remora.errors import RemoraError


def flat_us(rows: int) -> int:
    """A device that takes little longer for more rows."""
    return 10_000 + 100 * rows


def linear_us(rows: int) -> int:
    """A device that gains nothing."""
    return 10_000 * rows


class Bench:
    """One worker whose runs take what `cost_us` says; a run is a list of tickets."""

    def __init__(self, plan: Plan, slots: int = 1, cost_us: Callable[[int], int] = flat_us) -> None:
        self.now_s = 0.0
        stretch = tuple((rows, cost_us(rows) / cost_us(1)) for rows in (1, 2, 4, 8, 16))
        self.plan = replace(plan, stretch=stretch)
        self.cost_us = cost_us
        self.running: list[list[Ticket]] = []
        self.sizes: list[int] = []
        self.used: Counter[str] = Counter()
        self.dropped: list[RemoraError] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.scheduler = FairScheduler(lambda _domain: slots, lambda: self.now_s, 10_000, self._call_later)
        self.scheduler.together = self._begin

    def _call_later(self, after_s: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now_s + after_s, call))

    def _begin(self, tickets: list[Ticket]) -> None:
        self.running.append(tickets)
        self.sizes.append(len(tickets))

    def submit(
        self,
        tenant: str = "a",
        *,
        form: object = "f",
        rows: int = 1,
        deadline_s: float | None = None,
        share: Share | None = None,
        model: str = "m",
    ) -> Ticket:
        ticket = Ticket(
            tenant,
            ("shared", model),
            lambda: self._begin([ticket]),
            self.dropped.append,
            deadline_s,
            share or Share(),
        )
        ticket.form, ticket.rows, ticket.plan = form, rows, self.plan
        self.scheduler.submit(ticket)
        return ticket

    def finish(self) -> list[Ticket]:
        tickets = self.running.pop(0)
        rows = sum(ticket.rows for ticket in tickets)
        run_us = self.cost_us(rows)
        self.now_s += run_us / 1e6
        for ticket in tickets:
            share_us = run_us * ticket.rows // rows
            self.used[ticket.tenant] += share_us
            self.scheduler.finished(ticket, share_us)
        return tickets

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now_s]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
        for _at_s, call in due:
            call()


def test_a_lone_request_starts_at_once_whatever_the_wait() -> None:
    bench = Bench(Plan(rows=8, wait_s=1.0))
    bench.submit()
    assert bench.sizes == [1]


def test_what_waits_behind_a_run_is_the_next_run_together() -> None:
    bench = Bench(Plan(rows=8))
    for _ in range(6):
        bench.submit()
    bench.finish()
    assert bench.sizes == [1, 5]


def test_a_batch_has_no_more_rows_than_the_plan_allows() -> None:
    bench = Bench(Plan(rows=8))
    for rows in (1, 5, 2, 1, 8, 3):
        bench.submit(rows=rows)
    while bench.running:
        bench.finish()
    assert bench.sizes == [1, 3, 1, 1]


def test_without_a_plan_nothing_is_joined() -> None:
    bench = Bench(Plan())
    for _ in range(5):
        bench.submit()
    while bench.running:
        bench.finish()
    assert bench.sizes == [1] * 5


def test_pairs_are_made_only_while_so_many_wait_that_nobody_is_answered_later() -> None:
    bench = Bench(Plan(backlog=2), slots=2, cost_us=linear_us)
    for _ in range(7):
        bench.submit()
    assert bench.sizes == [1, 1], "five wait"
    bench.finish()
    assert bench.sizes == [1, 1, 2], "four waited behind the first, enough for a pair in each slot"
    bench.finish()
    assert bench.sizes == [1, 1, 2, 1], "two wait behind the first: too few"


def test_no_pairs_are_made_while_tenants_compete() -> None:
    bench = Bench(Plan(backlog=2), slots=2, cost_us=linear_us)
    for _ in range(9):
        bench.submit("flood")
    bench.submit("quiet")
    while bench.running:
        bench.finish()
    assert set(bench.sizes) == {1}


@pytest.mark.parametrize("form", ["other", None])
def test_requests_of_another_form_or_of_none_run_by_themselves(form: object) -> None:
    bench = Bench(Plan(rows=8))
    bench.submit()
    bench.submit("b", form=form)
    bench.submit("c")
    bench.submit("d")
    bench.finish()
    bench.finish()
    assert sorted(bench.sizes) == [1, 1, 2]


def test_a_batch_joins_tenants_and_each_pays_its_part() -> None:
    bench = Bench(Plan(rows=8))
    for tenant in "abcd":
        bench.submit(tenant)
    bench.finish()
    assert {ticket.tenant for ticket in bench.finish()} == {"b", "c", "d"}
    assert bench.used["b"] == flat_us(3) // 3


def test_other_models_are_not_joined_and_keep_their_place() -> None:
    bench = Bench(Plan(rows=8))
    bench.submit("a")
    bench.submit("b", model="other")
    bench.submit("c")
    bench.submit("d")
    assert [ticket.tenant for ticket in bench.finish()] == ["a"]
    assert [ticket.tenant for ticket in bench.finish()] == ["b"]
    assert [ticket.tenant for ticket in bench.finish()] == ["c", "d"]


def test_a_batch_does_not_make_a_member_late() -> None:
    bench = Bench(Plan(rows=8), cost_us=linear_us)
    bench.scheduler.seed(("shared", "m"), {1: 10_000, 2: 20_000, 8: 80_000})
    bench.submit("a")
    bench.submit("a", deadline_s=0.035)
    for _ in range(6):
        bench.submit("a")
    bench.finish()
    assert bench.sizes == [1, 2]
    bench.finish()
    assert not bench.dropped


def test_while_tenants_compete_a_batch_that_gains_nothing_is_not_made() -> None:
    bench = Bench(Plan(rows=8), cost_us=linear_us)
    bench.scheduler.seed(("shared", "m"), {1: 10_000, 8: 80_000})
    for _ in range(20):
        bench.submit("flood")
    bench.submit("quiet")
    bench.finish()
    finished = [bench.finish(), bench.finish()]
    assert "quiet" in [ticket.tenant for tickets in finished for ticket in tickets]
    assert max(bench.sizes) <= 2


def test_many_tenants_may_share_a_batch_that_spares_them_as_many_turns() -> None:
    bench = Bench(Plan(rows=16), cost_us=lambda rows: 10_000 + 3_000 * rows)
    bench.scheduler.seed(("shared", "m"), {1: 13_000, 16: 58_000})
    for number in range(12):
        bench.submit(f"tenant-{number}")
    bench.finish()
    assert bench.sizes[1] >= 8


def test_a_request_waits_for_company_only_while_the_worker_is_busy_and_only_so_long() -> None:
    bench = Bench(Plan(rows=3, wait_s=0.005), slots=2)
    bench.submit()
    bench.submit()
    assert bench.sizes == [1]
    bench.submit()
    bench.submit()
    assert bench.sizes == [1, 3]
    bench.finish()
    bench.submit()
    assert bench.sizes == [1, 3]
    bench.advance(0.006)
    assert bench.sizes == [1, 3, 1]


def test_who_waits_for_company_starts_when_the_worker_falls_idle() -> None:
    bench = Bench(Plan(rows=8, wait_s=10.0), slots=2)
    bench.submit(model="other", form=None)
    bench.submit()
    assert bench.sizes == [1]
    bench.finish()
    assert bench.sizes == [1, 1]


def test_a_plan_bounds_the_runs_of_its_model_and_lets_others_pass() -> None:
    bench = Bench(Plan(concurrent=1), slots=3)
    for model in ("m", "m", "other", "m"):
        bench.submit(model=model)
    assert [tickets[0].lane[1] for tickets in bench.running] == ["m", "other"]
    for _ in range(4):
        bench.finish()
    assert not bench.scheduler.waiting


def test_a_member_that_ends_early_does_not_free_the_slot_of_the_others() -> None:
    bench = Bench(Plan(rows=8))
    for _ in range(4):
        bench.submit()
    bench.finish()
    (members,) = bench.running
    bench.submit()
    bench.scheduler.finished(members[0], 10, measured=False)
    assert len(bench.running) == 1
    for member in members[1:]:
        bench.scheduler.finished(member, 10)
    assert len(bench.running) == 2


@pytest.mark.parametrize("weight", [1.0, 3.0])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 16), slots=st.integers(1, 3), gains=st.booleans())
def test_device_time_follows_weights_with_batches(weight: float, rows: int, slots: int, gains: bool) -> None:
    bench = Bench(Plan(rows=rows), slots, flat_us if gains else linear_us)
    shares = {"a": Share(weight), "b": Share()}
    for _ in range(40):
        for tenant, share in shares.items():
            bench.submit(tenant, share=share)
    for _ in range(400):
        for ticket in bench.finish():
            bench.submit(ticket.tenant, share=ticket.share)
    assert bench.used["a"] / bench.used["b"] == pytest.approx(weight, rel=0.05)


@pytest.mark.parametrize("cost_us", [flat_us, linear_us])
def test_beside_a_flood_with_batches_a_sequential_tenant_keeps_its_time(cost_us: Callable[[int], int]) -> None:
    bench = Bench(Plan(rows=8), cost_us=cost_us)
    bench.scheduler.seed(("shared", "m"), {rows: cost_us(rows) for rows in (1, 2, 4, 8)})
    for _ in range(64):
        bench.submit("flood")
    waits: list[float] = []
    began_s: float | None = None
    for _ in range(300):
        if began_s is None:
            began_s = bench.now_s + cost_us(1) / 2e6  # it comes in the middle of a run
            bench.submit("quiet")
        for ticket in bench.finish():
            if ticket.tenant == "quiet" and began_s is not None:
                waits.append(bench.now_s - began_s)
                began_s = None
            elif ticket.tenant == "flood":
                bench.submit("flood")
    waits.sort()
    assert waits[len(waits) // 2] <= 2.5 * cost_us(1) / 1e6


_STEP = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from("abc"), st.integers(1, 5)),
    st.tuples(st.just("finish"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("advance"), st.integers(0, 3), st.just(0)),
)


@given(st.lists(_STEP, max_size=80), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0.0, 0.002]))
def test_with_batches_every_request_ends_once(
    steps: list[tuple[str, str | int, int]], slots: int, concurrent: int, wait_s: float
) -> None:
    bench = Bench(Plan(rows=6, wait_s=wait_s, concurrent=concurrent), slots)
    tickets: list[Ticket] = []
    cancelled = ended = 0
    for name, value, more in steps:
        if name == "submit":
            share = Share(concurrent=more % 3, weight=more)
            tickets.append(bench.submit(str(value), rows=more, form=more % 2 or None, model=str(more), share=share))
        elif name == "finish" and bench.running:
            ended += len(bench.finish())
        elif name == "cancel" and tickets:
            cancelled += bench.scheduler.cancel(tickets[int(value) % len(tickets)])
        elif name == "advance":
            bench.advance(int(value) / 1000)
        assert len(bench.running) <= slots
    for _ in range(2 * len(tickets) + 1):
        bench.advance(0.01)
        if bench.running:
            ended += len(bench.finish())
    assert ended + cancelled == len(tickets)
    assert not bench.scheduler.waiting
    assert not any(bench.scheduler.busy(ticket.lane) for ticket in tickets)


def test_run_times_hope_for_twice_what_they_saw_and_learn_better() -> None:
    times = RunTimes()
    assert times.of_rows_us(4) == 0.0
    times.learn(1000, 1, 1, 0.0)
    assert times.of_rows_us(2) == 1000
    assert times.of_rows_us(8) == 4000
    times.learn(1900, 2, 2, 0.0)
    assert times.of_rows_us(2) == 1900
    times.learn(3800, 4, 4, 0.0)
    assert times.of_rows_us(3) == pytest.approx(2850)
