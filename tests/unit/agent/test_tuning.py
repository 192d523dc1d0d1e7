"""Plans: chosen from measurements, kept between starts, and overruled by the operator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_rooms import Box, rooms
from fake_workers import FakeWorkers
from remora.agent import operations
from remora.agent.notebook import Facts, Notebook
from remora.agent.tickets import ALONE, Lane, Plan
from remora.agent.tuning import Tuning, choose, form_of
from remora.errors import AbortedError, InvalidArgumentError
from remora.workers.contract import SHARED, Measurement, ModelSource, ModelSpec, TensorSpec
from remora.workers.settings import WorkerSettings

LANE: Lane = (SHARED, "m")
FLAT = {1: 1000.0, 2: 1020.0, 4: 1050.0, 8: 1100.0, 16: 2000.0}
LINEAR = {1: 9300.0, 2: 17800.0, 4: 35700.0}
ROWS = (TensorSpec("input", "float32", (-1, 4)),)
GAINS = Measurement(FLAT, {1: 900.0, 2: 1800.0}, True)


@pytest.mark.parametrize(
    ("found", "device", "plan"),
    [
        (GAINS, "cpu", Plan(rows=8)),
        (Measurement(LINEAR, {1: 107, 2: 210}, True), "cpu", Plan(rows=1, backlog=2)),
        (Measurement(LINEAR, {1: 107, 2: 210}, False), "cpu", Plan(rows=1)),
        (Measurement({1: 9300.0, 2: 20000.0}, {}, True), "cpu", Plan(rows=1)),
        (Measurement({1: 300.0, 2: 600.0}, {}, True), "cpu", Plan(rows=1)),
        (Measurement(FLAT, {1: 900, 2: 1800}, False), "cpu", Plan(rows=1)),
        (Measurement(FLAT, {1: 900, 2: 500}, True), "cpu", Plan(rows=8, concurrent=1)),
        (Measurement(FLAT, {1: 900, 2: 910}, True), "cpu", Plan(rows=8)),
        (Measurement(FLAT, {1: 900, 2: 760}, True), "cpu", Plan(rows=8)),
        (Measurement(FLAT, {1: 900}, True), "cpu", Plan(rows=8)),
        (Measurement(FLAT, {1: 900, 2: 910}, True), "cuda:0", Plan(rows=8, concurrent=1)),
        (Measurement({}, {}, True), "cpu", ALONE),
    ],
)
def test_a_plan_follows_from_what_was_measured(found: Measurement, device: str, plan: Plan) -> None:
    assert replace(choose(found, device, 2), stretch=()) == plan


def test_how_long_batches_take_is_known_between_and_beyond_what_was_measured() -> None:
    plan = choose(GAINS, "cpu", 2)
    assert plan.stretch_of(1) == 1.0
    assert plan.stretch_of(8) == pytest.approx(1.1)
    assert plan.stretch_of(12) == pytest.approx(1.55)
    assert plan.stretch_of(32) == pytest.approx(4.0)
    assert ALONE.stretch_of(5) == 5.0, "what is unknown gains nothing"


def test_requests_have_one_form_if_they_differ_in_rows_only() -> None:
    def form(*shapes: tuple[int, ...], outputs: tuple[str, ...] = ()) -> object:
        tensors = [operations.tensor(str(number), "uint8", shape, _data(shape)) for number, shape in enumerate(shapes)]
        return form_of(operations.infer("m", tensors, outputs, deadline_s=None))

    def _data(shape: tuple[int, ...]) -> bytes:
        size = 1
        for dim in shape:
            size *= dim
        return bytes(size)

    one, three = form((1, 4), (1, 2)), form((3, 4), (3, 2))
    assert isinstance(one, tuple)
    assert isinstance(three, tuple)
    assert one[0] == three[0]
    assert (one[1], three[1]) == (1, 3)
    assert form((1, 5), (1, 2)) != one
    assert form((1, 4), (1, 2), outputs=("a",)) != one
    for alone in (
        form((2, 4), (1, 2)),
        form((0, 4)),
        form(
            (),
        ),
    ):
        assert alone == (None, 1)


class Bench:
    def __init__(self, state: Path, room: Any) -> None:
        self.room = room
        self.workers = FakeWorkers()
        self.now_s = 0.0
        self.seeded: list[Lane] = []
        self.source = ModelSource("m", "sha256:1", state / "m", "onnx")
        self.tuning = self.restart(state)

    def restart(self, state: Path) -> Tuning:
        notebook = Notebook(state / "models.json", self.room.disk)
        self.tuning = Tuning(self.workers, notebook, WorkerSettings(threads=2), lambda: self.now_s)
        self.tuning.seed = lambda lane, _curve: self.seeded.append(lane)
        return self.tuning

    def load(self, lane: Lane = LANE, *, inputs: tuple[TensorSpec, ...] = ROWS, **said: float) -> None:
        source = ModelSource("m", "sha256:1", self.source.path, "onnx", manifest={"batching": said})
        spec = ModelSpec("m", "tensor", inputs, ROWS, "cpu", 1000, "fake 1")
        self.tuning.loaded(lane, source, spec, 0.1)

    def plan(self, shape: tuple[int, ...] = (1, 4), lane: Lane = LANE) -> Plan:
        data = bytes(4 * shape[0] * shape[1])
        tensor = operations.tensor("input", "float32", shape, data)
        plan = self.tuning.plan(lane, operations.infer("m", [tensor], [], deadline_s=None))
        return replace(plan, stretch=())

    def settle(self) -> None:
        done: Box[object] = Box()
        self.room.disk.submit("notebook", lambda: None, done)
        self.room.wait(done)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with rooms(tmp_path / "state") as room:
        yield Bench(tmp_path, room)


def test_a_model_is_measured_once_when_it_first_falls_idle(bench: Bench) -> None:
    bench.load()
    assert bench.plan() == ALONE
    assert not bench.workers.measures
    bench.tuning.idle(LANE)
    bench.tuning.idle(LANE)
    ((key, shapes, most, done),) = bench.workers.measures
    assert (key, shapes, most) == ("m", [(1, 4)], 64)
    done(GAINS)
    assert bench.plan() == Plan(rows=8)
    assert bench.seeded == [LANE]
    bench.tuning.idle(LANE)
    assert len(bench.workers.measures) == 1


def test_a_model_that_is_never_idle_is_measured_all_the_same(bench: Bench) -> None:
    bench.load()
    bench.tuning.sweep()
    assert not bench.workers.measures
    bench.now_s = 6.0
    bench.tuning.sweep()
    assert bench.workers.measures


def test_open_sizes_are_those_of_the_first_request(bench: Bench) -> None:
    bench.load(inputs=(TensorSpec("input", "float32", (-1, -1)),))
    bench.tuning.idle(LANE)
    assert not bench.workers.measures
    bench.plan((3, 7))
    bench.tuning.idle(LANE)
    assert bench.workers.measures[0][1] == [(1, 7)]


def test_an_operator_who_wants_no_batches_gets_none_however_many_wait(bench: Bench) -> None:
    found = Measurement(LINEAR, {1: 107, 2: 210}, True)
    bench.load(rows=1)
    bench.tuning.idle(LANE)
    bench.workers.measures[0][3](found)
    assert bench.plan() == Plan(rows=1)
    bench.load()
    assert bench.plan() == Plan(rows=1, backlog=2)


def test_what_was_measured_is_known_after_a_restart(bench: Bench, tmp_path: Path) -> None:
    bench.load()
    bench.tuning.idle(LANE)
    bench.workers.measures[0][3](GAINS)
    bench.settle()
    bench.restart(tmp_path)
    bench.load()
    assert bench.plan() == Plan(rows=8)
    bench.tuning.idle(LANE)
    assert len(bench.workers.measures) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"version": 1, "models": {"k": {}}}', '{"version": 99}'])
def test_a_damaged_notebook_is_begun_anew(bench: Bench, tmp_path: Path, text: str) -> None:
    (tmp_path / "models.json").write_text(text)
    bench.restart(tmp_path)
    bench.load()
    bench.tuning.idle(LANE)
    bench.workers.measures[0][3](GAINS)
    bench.settle()
    assert json.loads((tmp_path / "models.json").read_text())["models"]


def test_what_a_tenant_uploaded_is_not_written_down_and_ends_with_it(bench: Bench, tmp_path: Path) -> None:
    own: Lane = ("tenant", "m")
    bench.load(own)
    bench.tuning.idle(own)
    bench.workers.measures[0][3](GAINS)
    bench.tuning.forget(own)
    bench.load(own)
    assert bench.plan(lane=own) == Plan(rows=8)
    bench.settle()
    assert not (tmp_path / "models.json").exists()
    bench.load(("other", "m"))
    assert bench.plan(lane=("other", "m")) == ALONE, "another tenant learns nothing of it"
    bench.tuning.forget(own)
    bench.tuning.forget_domain("tenant")
    bench.load(own)
    assert bench.plan(lane=own) == ALONE


def test_a_model_that_does_not_run_on_samples_is_left_alone(bench: Bench) -> None:
    bench.load()
    bench.tuning.idle(LANE)
    bench.workers.measures[0][3](InvalidArgumentError("the model refused to run"))
    assert bench.plan() == ALONE
    bench.tuning.forget(LANE)
    bench.load()
    bench.tuning.idle(LANE)
    assert len(bench.workers.measures) == 1


def test_an_answer_for_a_model_that_was_unloaded_meanwhile_changes_nothing(bench: Bench) -> None:
    bench.load()
    bench.tuning.idle(LANE)
    bench.tuning.forget(LANE)
    bench.workers.measures[0][3](AbortedError("the worker died"))
    assert bench.plan() == ALONE


def test_the_operators_word_goes_first(bench: Bench) -> None:
    bench.load(rows=4, wait_ms=2.5, concurrent=1)
    assert bench.plan() == Plan(rows=4, wait_s=0.0025, concurrent=1)
    bench.tuning.idle(LANE)
    bench.workers.measures[0][3](GAINS)
    assert bench.plan() == Plan(rows=4, wait_s=0.0025, concurrent=1), "measured for what it costs others only"
    bench.tuning.forget(LANE)
    bench.load(inputs=(TensorSpec("input", "float32", (1, 4)),), rows=4)
    assert bench.plan() == ALONE, "a model without an open first axis takes one request at a time"


def test_of_runs_with_several_threads_as_many_are_at_once_as_there_is_room_for(bench: Bench) -> None:
    bench.load(threads=2)
    assert bench.plan() == Plan(concurrent=1)
    bench.tuning.forget(LANE)
    bench.load(threads=64)
    assert bench.plan() == Plan(concurrent=1), "no more threads than the worker may compute with"
    bench.tuning.forget(LANE)
    bench.load(threads=2, concurrent=2)
    assert bench.plan() == Plan(concurrent=2), "the operator's word goes first"


def test_uploads_without_end_are_measured_a_small_part_of_the_time(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.load(("tenant", name))
        bench.tuning.idle(("tenant", name))
    bench.load(("other", "a"))
    bench.tuning.idle(("other", "a"))
    assert len(bench.workers.measures) == 2, "one of each tenant"
    bench.workers.measures[0][3](GAINS)
    bench.now_s = 9.0
    bench.tuning.sweep()
    assert len(bench.workers.measures) == 2
    bench.now_s = 10.5
    bench.tuning.sweep()
    assert len(bench.workers.measures) == 3


def test_what_is_known_of_a_tenants_uploads_is_bounded(tmp_path: Path) -> None:
    with rooms(tmp_path / "state") as room:
        notebook = Notebook(tmp_path / "models.json", room.disk)
        for number in range(1000):
            notebook.put("tenant", str(number), Facts(str(number), memory_bytes=number), kept=False)
        assert notebook.memory_bytes("tenant", "999", kept=False) == 999
        assert notebook.get("tenant", "0", kept=False) is None
        assert notebook.get("tenant", "900", kept=False) is not None


def test_pictures_for_one_operation_have_one_form_whatever_their_size() -> None:
    small, large = (operations.picture("classify", "m", bytes(size), 5, deadline_s=None) for size in (10, 1000))
    assert form_of(small) == form_of(large) == ("classify", 1)
    assert form_of(operations.picture("detect", "m", b"x", 5, deadline_s=None))[0] != form_of(small)[0]
