"""How a model likes to be run must not be decided by what else runs on the machine, or by a budget that ran out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from remora.backends.contract import Array, Exposure, Spec, Stop
from remora.errors import CancelledError
from remora.workers.calibration import Budget, by_threads, curve

INPUTS = (Spec("input", "float32", (1, 4)),)


class FakeModel:
    """A model that takes its time as it is told."""

    inputs: tuple[Spec, ...] = INPUTS
    outputs: tuple[Spec, ...] = INPUTS
    memory_bytes = 0
    exposure = Exposure()

    def __init__(self, take: Callable[[Stop], None], device: str) -> None:
        self._take = take
        self.device = device

    def check(self, _feeds: Mapping[str, Array], _wanted: Sequence[str]) -> tuple[str, ...]:
        return ("input",)

    def plan(self, _feeds: Mapping[str, Array], _wanted: Sequence[str]) -> tuple[Spec, ...] | None:
        return None

    def run(
        self, feeds: Mapping[str, Array], _wanted: Sequence[str], stop: Stop, _into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        self._take(stop)
        return [np.array(feeds["input"])]


def rates(take: Callable[[Stop], None], *, device: str = "cuda:0", budget_s: float = 0.2) -> dict[int, float]:
    budget = Budget(budget_s)
    try:
        return by_threads(FakeModel(take, device), INPUTS, ["input"], budget, 2)
    finally:
        budget.close()


def test_threads_that_wait_for_the_processor_say_nothing_of_the_model() -> None:
    """Sleeping stands in for a machine whose processors others have."""
    assert rates(lambda _stop: time.sleep(0.002), device="cpu") == {}


def test_runs_on_another_device_use_no_processor_and_count() -> None:
    found = rates(lambda _stop: time.sleep(0.002))
    assert found[2] == pytest.approx(2 * found[1], rel=0.5)


def test_threads_that_are_in_each_others_way_are_found() -> None:
    lock = threading.Lock()

    def take(_stop: Stop) -> None:
        with lock:
            time.sleep(0.002)

    found = rates(take)
    assert found[2] == pytest.approx(found[1], rel=0.3)


def test_a_budget_that_runs_out_is_no_verdict() -> None:
    def take(stop: Stop) -> None:
        while not stop.requested:
            time.sleep(0.001)
        raise CancelledError("the run was stopped")

    assert rates(take, budget_s=0.05) == {}


def test_what_a_run_waited_for_is_not_what_it_took() -> None:
    """A busy machine must not make a run of two rows look quicker than one of one row."""
    waits = iter([0.02, 0.0, 0.02, 0.0, 0.02, 0.0, 0.02, 0.0, 0.02, 0.0])

    def take(_stop: Stop) -> None:
        until_s = time.thread_time() + 0.002
        while time.thread_time() < until_s:
            pass
        time.sleep(next(waits, 0.0))

    budget = Budget(2.0)
    try:
        found = curve(FakeModel(take, "cpu"), INPUTS, ["input"], budget, 2)
    finally:
        budget.close()
    assert found[1] == pytest.approx(2000, rel=0.5)
    assert found[2] == pytest.approx(2000, rel=0.5)


def test_requests_in_threads_of_the_same_process_make_no_run_look_longer() -> None:
    def compute(_stop: Stop) -> None:
        end_s = time.thread_time() + 0.02
        while time.thread_time() < end_s:
            pass

    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            pass

    other = threading.Thread(target=others, daemon=True)
    other.start()
    budget = Budget(5.0)
    try:
        found = curve(FakeModel(compute, "cpu"), INPUTS, ["input"], budget, 1)
    finally:
        budget.close()
        over.set()
        other.join()
    assert 20_000 <= found[1] < 28_000, (
        "by the clock it takes twice as long: one interpreter runs both threads in turns"
    )
