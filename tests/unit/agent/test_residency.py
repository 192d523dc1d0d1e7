"""Which models stay: a budget, who goes first, and that nothing busy goes and nobody waits forever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.residency import Residency
from remora.agent.tickets import Lane
from remora.errors import CancelledError, RemoraError, ResourceExhaustedError


def lane(name: str) -> Lane:
    return "shared", name


class Bench:
    """Loads end when the test says so; sizes are what was announced unless it says otherwise."""

    def __init__(self, budget: int = 100) -> None:
        self.now_s = 0.0
        self.busy: set[Lane] = set()
        self.loading: dict[Lane, int] = {}
        self.loaded: dict[Lane, int] = {}
        self.evicted: list[str] = []
        self.failed: list[RemoraError] = []
        self.residency = Residency(lambda _device: budget, lambda: self.now_s, self.busy.__contains__, self._evict)

    def _evict(self, key: Lane) -> None:
        assert key not in self.busy, "what is busy must stay"
        del self.loaded[key]
        self.evicted.append(key[1])

    def ask(self, name: str, size: int, domain: str = "shared") -> None:
        key = domain, name

        def start() -> None:
            self.loading[key] = size

        self.residency.admit(key, "cpu", size, start, self.failed.append)

    def arrive(self, name: str, size: int | None = None, load_s: float = 0.1) -> None:
        key = lane(name)
        announced = self.loading.pop(key)
        self.residency.loaded(key, "cpu", announced if size is None else size, load_s)
        self.loaded[key] = announced if size is None else size
        self.residency.trim()

    def load(self, name: str, size: int, load_s: float = 0.1) -> None:
        self.ask(name, size)
        self.arrive(name, load_s=load_s)

    def idle(self, name: str) -> None:
        self.busy.discard(lane(name))
        self.residency.idle(lane(name))

    @property
    def names(self) -> set[str]:
        return {name for _domain, name in self.loaded}


def test_what_fits_stays() -> None:
    bench = Bench()
    for name in "abc":
        bench.load(name, 30)
    assert bench.names == {"a", "b", "c"}
    assert bench.residency.used_bytes() == {"cpu": 90}


def test_the_model_that_was_used_longest_ago_makes_room() -> None:
    bench = Bench()
    for name in "abc":
        bench.load(name, 30)
    bench.now_s = 10.0
    bench.residency.used(lane("a"))
    bench.residency.used(lane("c"))
    bench.now_s = 20.0
    bench.load("d", 30)
    assert bench.evicted == ["b"]


def test_of_equally_unused_models_the_one_goes_that_is_cheap_to_load_for_its_size() -> None:
    bench = Bench()
    bench.load("dear", 40, load_s=2.0)
    bench.load("cheap", 40, load_s=0.1)
    bench.now_s = 10.0
    bench.load("new", 30)
    assert bench.evicted == ["cheap"]


def test_no_more_goes_than_must() -> None:
    bench = Bench()
    for name in "abcde":
        bench.load(name, 20)
        bench.now_s += 1
    bench.load("new", 35)
    assert bench.evicted == ["a", "b"]


def test_a_model_larger_than_the_budget_is_refused_with_both_sizes() -> None:
    bench = Bench()
    bench.load("a", 30)
    with pytest.raises(ResourceExhaustedError, match=r"takes 101 bytes.*take 100.*workers\.device_memory_bytes"):
        bench.ask("huge", 101)
    bench.ask("liar", 50)
    with pytest.raises(ResourceExhaustedError, match="takes 200"):
        bench.arrive("liar", 200)
    assert bench.names == {"a"}


def test_loads_under_way_count() -> None:
    bench = Bench()
    bench.ask("a", 60)
    bench.ask("b", 60)
    assert set(bench.loading) == {lane("a")}
    bench.arrive("a")
    bench.residency.idle(lane("a"))
    assert bench.evicted == ["a"]
    assert set(bench.loading) == {lane("b")}


def test_a_load_that_failed_leaves_its_room() -> None:
    bench = Bench()
    bench.ask("a", 60)
    bench.ask("b", 60)
    del bench.loading[lane("a")]
    bench.residency.failed(lane("a"))
    assert set(bench.loading) == {lane("b")}


def test_what_is_busy_is_not_put_out_until_it_falls_idle() -> None:
    bench = Bench()
    bench.load("a", 80)
    bench.busy.add(lane("a"))
    bench.ask("b", 80)
    assert not bench.evicted
    bench.idle("a")
    assert bench.evicted == ["a"]
    assert set(bench.loading) == {lane("b")}


def test_a_model_that_never_falls_idle_takes_its_leave_in_the_end() -> None:
    bench = Bench()
    bench.load("a", 80)
    bench.busy.add(lane("a"))
    bench.ask("b", 80)
    bench.residency.sweep()
    assert not bench.residency.leaving(lane("a"))
    bench.now_s = 2.0
    bench.residency.sweep()
    assert bench.residency.leaving(lane("a")), "it takes no new requests"
    assert not bench.evicted
    bench.ask("a", 80)
    bench.idle("a")
    assert bench.evicted == ["a"]
    bench.arrive("b")
    bench.busy.add(lane("b"))
    bench.now_s = 2.5
    bench.residency.sweep()
    assert not bench.residency.leaving(lane("b")), "it may stay for a while first"
    bench.now_s = 4.0
    bench.residency.sweep()
    bench.idle("b")
    assert set(bench.loading) == {lane("a")}


def test_a_model_that_grew_makes_others_go() -> None:
    bench = Bench()
    bench.load("a", 30)
    bench.ask("b", 30)
    bench.now_s = 1.0
    bench.arrive("b", 80)
    assert bench.evicted == ["a"]
    bench.load("c", 20)
    bench.residency.grown(lane("c"), 40)
    bench.residency.sweep()
    assert bench.evicted == ["a", "b"]


def test_a_load_without_room_fails_after_a_while_with_a_hint() -> None:
    bench = Bench()
    bench.ask("stuck", 90)
    bench.ask("b", 90)
    bench.now_s = 31.0
    bench.residency.sweep()
    (error,) = bench.failed
    assert isinstance(error, ResourceExhaustedError)
    assert "try again" in str(error)


def test_a_load_that_is_not_wanted_any_more_is_answered() -> None:
    bench = Bench()
    bench.load("a", 90)
    bench.busy.add(lane("a"))
    bench.ask("b", 90)
    bench.residency.forget([lane("b")])
    assert isinstance(bench.failed[0], CancelledError)
    bench.residency.forget([lane("a")])
    assert bench.residency.used_bytes() == {}


def test_without_a_budget_everything_stays() -> None:
    bench = Bench(budget=0)
    for number in range(50):
        bench.load(str(number), 1 << 30)
    assert len(bench.loaded) == 50


_STEP = st.tuples(st.sampled_from(["ask", "arrive", "busy", "idle", "wait"]), st.integers(0, 5), st.integers(1, 60))


@given(st.lists(_STEP, max_size=80))
def test_the_budget_holds_and_every_load_comes_to_an_end(steps: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    asked: set[Lane] = set()
    for name, number, size in steps:
        key = lane(str(number))
        if name == "ask" and key not in asked and key not in bench.loaded:
            asked.add(key)
            bench.ask(key[1], size)
        elif name == "arrive" and key in bench.loading:
            asked.discard(key)
            bench.arrive(key[1])
        elif name == "busy" and key in bench.loaded:
            bench.busy.add(key)
        elif name == "idle" and key in bench.loaded:
            bench.idle(key[1])
        elif name == "wait":
            bench.now_s += 0.5
            bench.residency.sweep()
        assert sum(bench.loaded.values()) + sum(bench.loading.values()) <= 100
    for _ in range(200):
        for key in list(bench.loading):
            asked.discard(key)
            bench.arrive(key[1])
        for key in list(bench.loaded):
            if key in bench.busy:
                bench.idle(key[1])
        bench.now_s += 1.0
        bench.residency.sweep()
    assert not asked
    assert not bench.failed


def test_a_tenant_with_many_models_to_load_lets_others_take_turns() -> None:
    bench = Bench()
    bench.load("a", 90)
    bench.busy.add(lane("a"))
    for number in range(5):
        bench.ask(f"many{number}", 60, "greedy")
    bench.ask("one", 60, "modest")
    bench.ask("other", 60)
    bench.busy.clear()
    order = []
    while True:
        bench.residency.idle(lane("a"))
        if not bench.loading:
            break
        (key,) = bench.loading
        order.append(key[1])
        del bench.loading[key]
        bench.residency.failed(key)
        order += [key[1] for key in bench.loading if len(bench.loading) > 1]
    assert order[:3] == ["many0", "one", "other"]
    assert order[3:] == ["many1", "many2", "many3", "many4"]


def test_a_tenant_loads_a_few_models_at_a_time() -> None:
    bench = Bench()
    for number in range(6):
        bench.ask(f"small{number}", 1, "eager")
    bench.ask("other", 1, "patient")
    assert [domain for domain, _name in bench.loading].count("eager") == 4
    assert ("patient", "other") in bench.loading
    del bench.loading["eager", "small0"]
    bench.residency.failed(("eager", "small0"))
    assert ("eager", "small4") in bench.loading
