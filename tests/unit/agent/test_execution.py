"""From operation to answer with workers that fail on demand: idempotency, cancellation, and memory given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_rooms import Box
from fake_workers import FakeWorkers
from remora.agent import operations
from remora.agent.answers import Answer
from remora.agent.core import Core
from remora.agent.identity import Identity
from remora.agent.logs import Log
from remora.agent.policy import Limits, Policy
from remora.agent.rules import Rules, parse_rules
from remora.agent.sessions import Session
from remora.errors import (
    AbortedError,
    CancelledError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RemoraError,
    ResourceExhaustedError,
)
from remora.reactor import Reactor
from remora.workers.contract import ModelSource, Result


class Info:
    description, licence, size_bytes = "", "", 1


class Entry:
    def __init__(self, name: str, path: Path) -> None:
        digest = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of "foo"
        manifest = {"batching": {"rows": 8}} if name == "batched" else {}
        self.source = ModelSource(name, digest, path, "onnx", manifest=manifest)
        self.info = Info()


class Bench:
    def __init__(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.write_bytes(b"foo")
        self.workers = FakeWorkers()
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        self.log = Log()
        state = tmp_path / "state"
        state.mkdir()
        catalogue = {name: Entry(name, model) for name in ("m", "broken", "batched")}
        policy = Policy(limits=Limits(queue_length_per_tenant=2))
        self.core = Core(self.reactor, state, policy, self.workers, catalogue, self.log)
        self.session = self.open("uid:1")
        self.released: list[int] = []

    def open(self, key: str) -> Session:
        box: Box[Any] = Box()
        self.core.sessions.create(Identity(key, key), box)
        self.until(lambda: box.values)
        session: Session = box.values[0][0]
        return session

    def until(self, condition: Any) -> None:
        for _ in range(1000):
            if condition():
                return
            self.reactor.run_once(0.01)
        pytest.fail("it did not happen")

    def infer(self, request_id: int = 0, model: str = "m") -> tuple[Any, Box[Answer | RemoraError]]:
        tensor = operations.tensor("input", "uint8", [1], b"1")
        operation = operations.infer(model, [tensor], [], deadline_s=None, request_id=request_id)
        box: Box[Answer | RemoraError] = Box()
        run = self.core.execution.run(self.session, operation, lambda: self.released.append(1), box)
        return run, box

    def until_values(self, box: Box[Any]) -> None:
        self.until(lambda: box.values)

    def until_job(self) -> None:
        self.until(lambda: self.workers.jobs)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.core.close()
    opened.reactor.close()
    opened.log.close()
    assert not opened.errors


def test_a_model_is_loaded_once_before_its_first_request(bench: Bench) -> None:
    _run, first = bench.infer()
    bench.infer()
    bench.until_job()
    assert bench.workers.loads == [("shared", "m")]
    bench.workers.finish()
    assert isinstance(first.values[0], Answer)
    assert bench.released == [1]


def test_a_model_that_does_not_load_fails_its_requests_and_is_tried_again(bench: Bench) -> None:
    for count in (1, 2):
        _run, box = bench.infer(model="broken")
        bench.until_values(box)
        assert isinstance(box.values[0], RemoraError)
        assert len(bench.workers.loads) == count
    assert bench.released == [1, 1]


def test_an_unknown_model_is_refused_with_the_catalogue(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="batched, broken, m"):
        bench.infer(model="nothing")
    assert bench.released == []


def test_a_request_sent_again_joins_the_one_that_runs(bench: Bench) -> None:
    _run, first = bench.infer(7)
    bench.until_job()
    _run, second = bench.infer(7)
    assert len(bench.workers.jobs) == 1
    bench.workers.finish(Result(run_us=5))
    assert first.values[0] is second.values[0]


def test_a_request_sent_again_is_answered_from_memory(bench: Bench) -> None:
    released: list[int] = []
    _run, first = bench.infer(7)
    bench.until_job()
    bench.workers.finish(Result(run_us=5, release=lambda: released.append(1)))
    first.values[0].drop()  # type: ignore[union-attr]  # an answer
    _run, second = bench.infer(7)
    assert second.values == first.values
    assert not bench.workers.jobs
    second.values[0].drop()  # type: ignore[union-attr]  # an answer
    assert released == []
    bench.core.sessions.end(bench.session)
    assert released == [1]


def test_a_failed_request_is_run_again_when_it_is_sent_again(bench: Bench) -> None:
    _run, first = bench.infer(7)
    bench.until_job()
    bench.workers.finish(AbortedError("killed two workers"))
    assert isinstance(first.values[0], AbortedError)
    bench.infer(7)
    assert len(bench.workers.jobs) == 1


def test_a_lost_connection_cancels_what_cannot_be_sent_again(bench: Bench) -> None:
    run, box = bench.infer()
    bench.until_job()
    bench.core.execution.cancel(run)
    assert bench.workers.jobs[0].cancelled
    assert not box.values
    assert bench.released == []  # the worker may still read
    bench.workers.finish()
    assert isinstance(box.values[0], CancelledError)
    assert bench.released == [1]


def test_a_lost_connection_lets_a_request_with_a_key_finish(bench: Bench) -> None:
    run, _box = bench.infer(7)
    bench.until_job()
    bench.core.execution.cancel(run)
    assert not bench.workers.jobs[0].cancelled
    bench.workers.finish(Result(run_us=5))
    _run, again = bench.infer(7)
    assert isinstance(again.values[0], Answer)


def test_a_waiting_request_is_dropped_with_its_connection(bench: Bench) -> None:
    bench.infer()
    run, waiting = bench.infer(8)
    bench.until_job()
    bench.core.execution.cancel(run)
    assert isinstance(waiting.values[0], CancelledError)
    bench.workers.finish()
    assert not bench.workers.jobs


def test_a_full_queue_refuses_and_keeps_no_trace(bench: Bench) -> None:
    bench.infer()
    bench.until_job()
    bench.infer()
    bench.infer()
    with pytest.raises(ResourceExhaustedError, match="queue_length"):
        bench.infer(9)
    bench.workers.finish()
    bench.infer(9)


def test_requests_that_wait_for_a_model_are_bounded_though_they_are_given_up(bench: Bench) -> None:
    bench.workers.hold_loads = True
    for _ in range(2):
        run, _box = bench.infer()
        bench.core.execution.cancel(run)
    with pytest.raises(ResourceExhaustedError, match="queue_length_per_tenant"):
        bench.infer()
    bench.until(lambda: bench.workers.pending_loads)
    bench.workers.pending_loads.pop()()
    assert bench.released == [1, 1]
    bench.infer()
    bench.until_job()
    bench.workers.finish()


def test_a_request_that_is_sent_again_and_again_is_refused_in_the_end(bench: Bench) -> None:
    for _ in range(64):
        bench.infer(7)
    with pytest.raises(ResourceExhaustedError, match="too often"):
        bench.infer(7)
    bench.until_job()
    bench.workers.finish()
    assert len(bench.released) == 64


def test_a_worker_of_a_tenants_own_cannot_say_that_it_ran_for_no_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(bench.core.quotas, "charge", lambda _tenant, _terms, run_us, **_more: charged.append(run_us))
    one = operations.tensor("x", "float32", [4], bytes(16))
    operation = operations.Operation("compute", "sgemm", (one,), function="sgemm")
    answered: Box[Answer | RemoraError] = Box()
    run = bench.core.execution.run(bench.session, operation, lambda: None, answered)
    assert run is not None
    run.timings.begun_s -= 1.0  # so long ago it went there
    bench.workers.finish(Result(run_us=0))
    assert charged[0] > 900_000


def test_time_that_ends_in_a_failure_is_charged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[int] = []
    monkeypatch.setattr(bench.core.quotas, "charge", lambda _tenant, _terms, run_us, **_more: charged.append(run_us))
    for outcome in (InvalidArgumentError("the model refused to run"), None):
        run, _box = bench.infer()
        bench.until_job()
        run.timings.begun_s -= 1.0
        if outcome is None:
            bench.core.execution.cancel(run)  # at the last moment
        bench.workers.finish(outcome)
    assert min(charged) > 900_000


def test_policy_is_asked_again_before_a_program_that_is_loaded_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = "sha256:" + "a" * 64
    program = tmp_path / "program"
    program.write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(bench.core.store, "owns", lambda _tenant, _digest: True)
    monkeypatch.setattr(bench.core.store, "open", lambda _tenant, _digest, done: done(program))
    bench.session.models = {digest: ""}
    allowed = parse_rules({"defaults": {"exec": True}}, "test", "test")
    bench.core.quotas.replace(allowed)
    bench.infer(model=digest)
    bench.until_job()
    bench.workers.finish()
    bench.core.quotas.replace(Rules())  # and it stays loaded
    with pytest.raises(PermissionDeniedError, match="TorchScript"):
        bench.infer(model=digest)
    bench.core.quotas.replace(allowed)
    bench.infer(model=digest)
    bench.workers.finish()
    assert len(bench.workers.loads) == 1


def test_a_session_that_ends_stops_its_requests(bench: Bench) -> None:
    bench.infer(1)
    bench.until_job()
    _run, waiting = bench.infer(2)
    bench.core.sessions.end(bench.session)
    assert bench.workers.jobs[0].cancelled
    assert isinstance(waiting.values[0], CancelledError)
    bench.workers.finish()


def test_an_idle_tenant_gives_its_workers_back(bench: Bench) -> None:
    bench.core.sessions.end(bench.session)
    bench.core.release_tenant("uid:1")
    assert bench.workers.released == ["uid:1"]


def test_requests_that_wait_for_one_model_run_as_one_and_are_answered_each(bench: Bench) -> None:
    _run, first = bench.infer(model="batched")
    bench.until_job()
    boxes = [bench.infer(model="batched")[1] for _ in range(2)]
    assert len(bench.workers.jobs) == 1
    bench.workers.finish()
    assert bench.workers.batches == [2]
    bench.workers.finish(Result(run_us=500, whole_us=1000))
    bench.workers.finish(InvalidArgumentError("the model refused to run"))
    assert isinstance(first.values[0], Answer)
    assert isinstance(boxes[0].values[0], Answer)
    assert isinstance(boxes[1].values[0], InvalidArgumentError)
    assert bench.released == [1, 1, 1]
    assert bench.core.execution.idle


def test_one_of_a_batch_that_is_given_up_is_cancelled_alone(bench: Bench) -> None:
    bench.infer(model="batched")
    bench.until_job()
    run, given_up = bench.infer(model="batched")
    _run, other = bench.infer(model="batched")
    bench.workers.finish()
    bench.core.execution.cancel(run)
    assert [job.cancelled for job in bench.workers.jobs] == [True, False]
    bench.workers.finish()
    bench.workers.finish()
    assert isinstance(given_up.values[0], CancelledError)
    assert isinstance(other.values[0], Answer)
