"""The fair queue: order, bounds, deadlines and cancellation, with time and workers as values."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.scheduler import FairScheduler
from remora.agent.tickets import Ticket
from remora.errors import DeadlineExceededError, RemoraError, ResourceExhaustedError


class Bench:
    """A scheduler with one slot, a clock, and a record of what happened."""

    def __init__(self, slots: int = 1, queue_length: int = 1000) -> None:
        self.now_s = 0.0
        self.running: deque[Ticket] = deque()
        self.started: list[str] = []
        self.dropped: list[RemoraError] = []
        self.scheduler = FairScheduler(lambda _domain: slots, lambda: self.now_s, queue_length)

    def submit(self, tenant: str, model: str = "m", deadline_s: float | None = None, domain: str = "shared") -> Ticket:
        ticket = Ticket(tenant, (domain, model), lambda: self._start(ticket), self.dropped.append, deadline_s)
        self.scheduler.submit(ticket)
        return ticket

    def _start(self, ticket: Ticket) -> None:
        self.running.append(ticket)
        self.started.append(ticket.tenant)

    def finish(self, run_us: int = 1000) -> None:
        self.scheduler.finished(self.running.popleft(), run_us)


def test_a_request_starts_at_once_when_a_worker_is_free() -> None:
    bench = Bench()
    bench.submit("a")
    assert bench.started == ["a"]


def test_a_flood_does_not_make_another_tenant_wait_for_more_than_its_turn() -> None:
    bench = Bench()
    for _ in range(64):
        bench.submit("flood")
    bench.submit("quiet")
    bench.finish()
    bench.finish()
    assert "quiet" in bench.started[:3]


def test_two_tenants_with_equal_requests_take_turns() -> None:
    bench = Bench()
    for _ in range(10):
        bench.submit("a")
    for _ in range(10):
        bench.submit("b")
    while bench.running:
        bench.finish()
    assert abs(bench.started[:12].count("a") - bench.started[:12].count("b")) <= 2


def test_a_tenant_with_long_requests_runs_fewer_of_them() -> None:
    bench = Bench()
    for _ in range(200):
        bench.submit("long", model="big")
        bench.submit("short", model="big")
    used: Counter[str] = Counter()
    for _ in range(100):
        tenant = bench.running[0].tenant
        cost = 9000 if tenant == "long" else 1000
        used[tenant] += cost
        bench.finish(cost)
    assert used["long"] / used["short"] == pytest.approx(1.0, rel=0.25)


def test_an_idle_tenant_saves_up_no_turns() -> None:
    bench = Bench()
    bench.submit("late")
    bench.finish()
    for _ in range(100):
        bench.submit("busy")
    for _ in range(50):
        bench.finish()
    for _ in range(20):
        bench.submit("late")
    before = len(bench.started)
    for _ in range(20):
        bench.finish()
    assert bench.started[before:].count("busy") >= 8


def test_a_full_queue_refuses_and_names_the_limit() -> None:
    bench = Bench(queue_length=2)
    for _ in range(3):
        bench.submit("a")
    with pytest.raises(ResourceExhaustedError, match=r"limits\.queue_length_per_tenant"):
        bench.submit("a")
    bench.submit("b")


def test_a_deadline_that_passed_in_the_queue_is_answered_without_running() -> None:
    bench = Bench()
    bench.submit("a")
    bench.submit("a", deadline_s=1.0)
    bench.now_s = 2.0
    bench.finish()
    assert [type(error) for error in bench.dropped] == [DeadlineExceededError]
    assert bench.started == ["a"]


def test_expire_drops_late_requests_while_no_worker_is_free() -> None:
    bench = Bench()
    bench.submit("a")
    bench.submit("b", deadline_s=1.0)
    bench.now_s = 1.5
    bench.scheduler.expire()
    assert len(bench.dropped) == 1
    assert not bench.scheduler.waiting


def test_a_cancelled_request_never_starts_and_frees_its_place() -> None:
    bench = Bench(queue_length=1)
    bench.submit("a")
    waiting = bench.submit("a")
    assert bench.scheduler.cancel(waiting)
    bench.submit("a")
    bench.finish()
    bench.finish()
    assert bench.started == ["a", "a"]
    assert not bench.scheduler.cancel(waiting)


def test_workers_do_not_wait_for_each_other() -> None:
    bench = Bench()
    bench.submit("a")
    bench.submit("a", domain="a")
    assert len(bench.started) == 2


def test_models_of_one_worker_share_its_slots() -> None:
    bench = Bench()
    bench.submit("a", model="one")
    bench.submit("a", model="two")
    assert len(bench.started) == 1
    bench.finish()
    assert len(bench.started) == 2


def test_a_tenants_flood_of_one_model_does_not_starve_its_own_requests_for_another() -> None:
    bench = Bench()
    for _ in range(50):
        bench.submit("a", model="flooded")
    ticket = bench.submit("a", model="other")
    for _ in range(3):
        bench.finish()
    assert ticket.state != Ticket.WAITING


def test_nothing_is_remembered_of_tenants_that_are_gone() -> None:
    bench = Bench()
    for number in range(100):
        bench.submit(f"tenant-{number}")
        bench.finish(1)
        bench.scheduler.forget(f"tenant-{number}")
    assert not bench.scheduler._virtual
    assert not bench.scheduler._active


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.sampled_from("abc"), st.sampled_from("xy")),
            st.tuples(st.just("finish"), st.integers(0, 5000), st.just("")),
            st.tuples(st.just("cancel"), st.integers(0, 50), st.just("")),
        ),
        max_size=80,
    ),
    st.integers(1, 3),
)
def test_every_request_is_started_dropped_or_cancelled_once_and_slots_are_kept(
    steps: list[tuple[str, object, str]], slots: int
) -> None:
    bench = Bench(slots=slots, queue_length=10)
    tickets: list[Ticket] = []
    cancelled = refused = 0
    for name, value, model in steps:
        if name == "submit":
            try:
                tickets.append(bench.submit(str(value), model))
            except ResourceExhaustedError:
                refused += 1
        elif name == "finish" and bench.running:
            assert isinstance(value, int)
            bench.finish(value)
        elif name == "cancel" and tickets:
            assert isinstance(value, int)
            cancelled += bench.scheduler.cancel(tickets[value % len(tickets)])
        for model_name in "xy":
            assert sum(ticket.lane[1] == model_name for ticket in bench.running) <= slots
    while bench.running:
        bench.finish()
    assert len(bench.started) + cancelled == len(tickets)
    assert not bench.scheduler.waiting
