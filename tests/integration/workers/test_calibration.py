"""Measuring models in a real worker: what gains, what does not, and what must never be joined."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pool_rig import Rig, infer, mean_model, rows_model, slow_model, table_model
from remora.agent.tuning import choose
from remora.errors import RemoraError
from remora.workers.contract import SHARED, Measurement, ModelSpec, Result


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("models"), standby=0, calibrate_ms=600)
    models = {"dear": rows_model(3000), "mean": mean_model(), "table": table_model(), "slow": slow_model(30)}
    for name, data in models.items():
        assert isinstance(made.load(SHARED, made.source(name, data)), ModelSpec)
    yield made
    made.close()


def measure(rig: Rig, model: str, shape: tuple[int, ...], most: int = 64) -> Measurement | RemoraError:
    box: list[Measurement | RemoraError] = []
    rig.pool.measure(SHARED, model, [shape], most, box.append)
    rig.until(lambda: box)
    return box[0]


def test_a_model_with_dear_runs_is_joined(rig: Rig) -> None:
    found = measure(rig, "dear", (1, 4))
    assert isinstance(found, Measurement)
    print(f"\n{ {rows: round(us) for rows, us in found.curve.items()} } us by rows")
    assert found.independent
    assert choose(found, "cpu", 2).rows >= 8


def test_a_model_whose_rows_depend_on_each_other_is_not(rig: Rig) -> None:
    found = measure(rig, "mean", (1, 4))
    assert isinstance(found, Measurement)
    assert not found.independent
    assert choose(found, "cpu", 2).rows == 1


def test_whole_numbers_are_samples_that_index_something(rig: Rig) -> None:
    found = measure(rig, "table", (1, 1))
    assert isinstance(found, Measurement)
    assert found.independent


def test_a_model_that_takes_longer_than_the_budget_ends_with_it(rig: Rig) -> None:
    began_s = time.monotonic()
    assert isinstance(measure(rig, "slow", (1,), most=1), RemoraError)
    assert time.monotonic() - began_s < 5


def test_requests_are_answered_meanwhile(rig: Rig) -> None:
    box: list[Any] = []
    rig.pool.measure(SHARED, "dear", [(1, 4)], 64, box.append)
    answers = 0
    while not box:
        result = rig.run(infer(np.ones((1, 4), np.float32), "dear"))
        assert isinstance(result, Result)
        result.release()
        answers += 1
    assert answers > 3


def test_a_worker_that_dies_meanwhile_is_an_answer(rig: Rig) -> None:
    box: list[Any] = []
    rig.pool.measure(SHARED, "slow", [(1,)], 1, box.append)
    process = rig.pool._domains[SHARED].process
    assert process is not None
    process.kill("the test ends it")
    rig.until(lambda: box)
    assert isinstance(box[0], RemoraError)
