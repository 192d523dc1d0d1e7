"""The pool with real, confined workers: loading, running, cancelling, and surviving whatever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from pool_rig import OPSET, Rig, infer, slow_model
from remora.catalog.architectures import identity
from remora.errors import (
    AbortedError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
    UnavailableError,
)
from remora.workers.blame import FORGIVEN
from remora.workers.contract import SHARED, Job, ModelSpec, Result, TensorView


@pytest.fixture(scope="module")
def shared_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("models"), standby=0)
    assert isinstance(rig.load(SHARED, rig.source("identity", identity({}))), ModelSpec)
    yield rig
    rig.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, standby=0, backoff_first_s=0.05, stop_grace_s=0.3)
    yield made
    made.close()


def test_a_spare_that_is_killed_is_replaced_before_anybody_needs_one(tmp_path: Path) -> None:
    made = Rig(tmp_path, standby=1, backoff_most_s=0.05)
    try:
        made.until(lambda: len(made.pool.workers()) == 1)
        killed = made.pool.workers()[0].pid
        os.kill(killed, signal.SIGKILL)
        made.until(lambda: [worker.pid for worker in made.pool.workers() if worker.pid != killed])
    finally:
        made.close()


def stubborn_model() -> bytes:
    """Return a model that is one long matrix product: no stop request ends it, only a kill."""
    size = 5000
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["input", "shape"], ["a"]),
            helper.make_node("MatMul", ["a", "a"], ["b"]),
            helper.make_node("ReduceSum", ["b"], ["output"], keepdims=0),
        ],
        "stubborn",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.asarray([size, size]), "shape")],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_tensor_in_the_arena_comes_back_without_a_copy_of_it(shared_rig: Rig) -> None:
    block = shared_rig.pool.allocate("t", 602_112)
    given = np.frombuffer(block.view, np.float32).reshape(1, 3, 224, 224)
    given[...] = np.random.default_rng(1).random(given.shape, np.float32)
    arena = shared_rig.pool._arenas["t"]
    box = shared_rig.submit(infer(given, inputs=(TensorView("input", "float32", given.shape, block.view),)))
    shared_rig.until(lambda: box)
    result = box[0]
    assert isinstance(result, Result)
    (output,) = result.outputs
    assert (output.name, output.dtype, output.shape) == ("output", "float32", (1, 3, 224, 224))
    assert np.array_equal(np.frombuffer(output.data, np.float32), given.reshape(-1))
    assert arena.locate(output.data) is not None
    assert arena.used == 2 * 602_112, "the tensor that was given and the one that came back, and no copy"
    result.release()
    block.release()
    assert arena.used == 0


def test_a_tensor_elsewhere_is_copied_in_and_its_copy_freed(shared_rig: Rig) -> None:
    given = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    result = shared_rig.run(infer(given, tenant="elsewhere"))
    assert isinstance(result, Result)
    assert np.array_equal(np.frombuffer(result.outputs[0].data, np.float32), given.reshape(-1))
    result.release()
    assert shared_rig.pool._arenas["elsewhere"].used == 0


def test_an_empty_tensor_passes_too(shared_rig: Rig) -> None:
    result = shared_rig.run(infer(np.zeros((0, 3, 2, 2), np.float32)))
    assert isinstance(result, Result)
    assert result.outputs[0].shape == (0, 3, 2, 2)
    result.release()


def test_many_jobs_in_flight_each_get_their_own_answer(shared_rig: Rig) -> None:
    boxes = [shared_rig.submit(infer(np.full((1, 1, 50, 50), n, np.float32))) for n in range(200)]
    shared_rig.until(lambda: all(boxes))
    for number, (result,) in enumerate(boxes):
        assert isinstance(result, Result)
        assert set(np.frombuffer(result.outputs[0].data, np.float32)) == {number}
        result.release()
    assert shared_rig.pool._arenas["t"].used == 0


def nonzero_model() -> bytes:
    """Return a model whose output's size only running tells: the indices of what is not zero."""
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["input"], ["found"]), helper.make_node("Neg", ["input"], ["minus"])],
        "nonzero",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N"])],
        [
            helper.make_tensor_value_info("found", TensorProto.INT64, [1, "found"]),
            helper.make_tensor_value_info("minus", TensorProto.FLOAT, ["N"]),
        ],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


def test_outputs_of_unknown_size_get_the_room_they_need(shared_rig: Rig) -> None:
    shared_rig.load(SHARED, shared_rig.source("nonzero", nonzero_model()))
    for count in (0, 3, 50_000, 50_000, 7):
        given = np.concatenate([np.ones(count, np.float32), np.zeros(5, np.float32)])
        result = shared_rig.run(infer(given, model="nonzero", tenant="sparse"))
        assert isinstance(result, Result)
        found, minus = result.outputs
        assert (found.name, found.dtype, found.shape) == ("found", "int64", (1, count))
        assert np.array_equal(np.frombuffer(found.data, np.int64), np.arange(count))
        assert np.array_equal(np.frombuffer(minus.data, np.float32), -given)
        result.release()
    assert shared_rig.pool._arenas["sparse"].used == 0


def test_outputs_come_in_the_order_in_which_they_were_asked_for(shared_rig: Rig) -> None:
    shared_rig.load(SHARED, shared_rig.source("nonzero", nonzero_model()))
    for names in (("minus",), ("minus", "found"), ("found",)):
        result = shared_rig.run(infer(np.ones(4, np.float32), model="nonzero", outputs=names))
        assert isinstance(result, Result)
        assert tuple(output.name for output in result.outputs) == names
        result.release()


def test_outputs_over_the_limit_are_refused_with_their_size(tmp_path: Path) -> None:
    rig = Rig(tmp_path, standby=0, arena_bytes=4 << 20, output_bytes=1 << 20)
    try:
        rig.load(SHARED, rig.source("nonzero", nonzero_model()))
        outcome = rig.run(infer(np.ones(200_000, np.float32), model="nonzero"))
        assert type(outcome) is ResourceExhaustedError
        assert "2400000 bytes" in str(outcome)
        assert rig.pool._arenas["t"].used == 0
    finally:
        rig.close()


def test_noop_needs_no_model_and_no_arena(shared_rig: Rig) -> None:
    result = shared_rig.run(Job("noop", SHARED, "nobody", ""))
    assert isinstance(result, Result)
    assert (result.outputs, result.labels) == ((), ())
    assert "nobody" not in shared_rig.pool._arenas


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (infer(np.zeros((1, 1), np.float32)), InvalidArgumentError, r"is float32\[1, 1\]"),
        (infer(np.zeros((1, 1, 1, 1))), InvalidArgumentError, "is float64"),
        (infer(np.zeros((1, 1, 1, 1), np.float32), outputs=("z",)), InvalidArgumentError, "no output 'z'"),
        (infer(np.zeros(1, np.float32), model="unknown"), NotFoundError, "unknown is not loaded"),
        (Job("dance", SHARED, "t", "identity"), InvalidArgumentError, "no operation 'dance'"),
        (
            Job("classify", SHARED, "t", "identity", image=memoryview(b"x")),
            InvalidArgumentError,
            "needs one for classification",
        ),
    ],
)
def test_a_wrong_job_is_a_clear_error_and_frees_its_memory(
    shared_rig: Rig, job: Job, error: type[RemoraError], message: str
) -> None:
    outcome = shared_rig.run(job)
    assert type(outcome) is error
    assert message.replace("\\", "") in str(outcome)
    assert shared_rig.pool._arenas["t"].used == 0


def test_a_tenant_that_asks_for_more_than_its_arena_is_refused(shared_rig: Rig) -> None:
    with pytest.raises(ResourceExhaustedError, match="arena"):
        shared_rig.pool.allocate("greedy", 1 << 40)


def test_slots_are_the_worker_threads_and_one_that_waits(shared_rig: Rig) -> None:
    assert shared_rig.pool.slots(SHARED) == 3


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_described_and_loading_it_again_is_no_work(shared_rig: Rig) -> None:
    again = shared_rig.load(SHARED, shared_rig.source("identity", identity({})))
    assert isinstance(again, ModelSpec)
    assert (again.key, again.device, again.inputs[0].shape) == ("identity", "cpu", (-1, -1, -1, -1))


@pytest.mark.parametrize(
    ("data", "more", "error"),
    [
        (b"this is no model", {}, InvalidArgumentError),
        (identity({}), {"digest": "sha256:" + "0" * 64}, DataLossError),
        (identity({}), {"task": "classification"}, InvalidArgumentError),
        (identity({}), {"path": Path("/nowhere/model.onnx")}, NotFoundError),
    ],
)
def test_a_wrong_model_file_is_a_clear_error(
    shared_rig: Rig, data: bytes, more: dict[str, Any], error: type[RemoraError]
) -> None:
    outcome = shared_rig.load(SHARED, shared_rig.source("wrong", data, **more))
    assert type(outcome) is error
    assert "wrong" not in shared_rig.worker().models


def test_an_unloaded_model_is_gone(shared_rig: Rig) -> None:
    shared_rig.load(SHARED, shared_rig.source("brief", identity({})))
    shared_rig.pool.unload(SHARED, "brief")
    assert type(shared_rig.run(infer(np.zeros((1, 1, 1, 1), np.float32), model="brief"))) is NotFoundError


def test_a_job_submitted_while_its_model_loads_waits_for_it(rig: Rig) -> None:
    rig.pool.load(SHARED, rig.source("identity", identity({})), lambda _spec: None)
    result = rig.run(infer(np.ones((1, 1, 1, 1), np.float32)))
    assert isinstance(result, Result)
    result.release()


# -- domains ----------------------------------------------------------------------------------------------------------


def test_each_domain_has_a_worker_of_its_own_and_none_knows_anothers_model(rig: Rig) -> None:
    rig.load("alice", rig.source("sha256:aa", identity({})))
    rig.load("bob", rig.source("sha256:bb", identity({})))
    assert rig.worker("alice").pid != rig.worker("bob").pid
    foreign = infer(np.zeros((1, 1, 1, 1), np.float32), model="sha256:aa", domain="bob", tenant="bob")
    assert type(rig.run(foreign)) is NotFoundError


def test_a_released_domain_leaves_no_process_and_no_memory(rig: Rig) -> None:
    rig.load("alice", rig.source("m", identity({})))
    rig.run(infer(np.zeros((1, 1, 1, 1), np.float32), model="m", domain="alice", tenant="alice"))
    pid = rig.worker("alice").pid
    rig.pool.release_domain("alice")
    rig.until(lambda: not psutil.pid_exists(pid))
    assert rig.pool._arenas == {}
    assert rig.pool.workers() == []


def test_the_spare_worker_serves_the_first_domain_and_is_replaced(tmp_path: Path) -> None:
    rig = Rig(tmp_path, standby=1)
    try:
        (spare,) = rig.pool.workers()
        rig.load("alice", rig.source("m", identity({})))
        assert rig.worker("alice").id == spare.id
        rig.until(lambda: len(rig.pool.workers()) == 2)
    finally:
        rig.close()


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_stops_and_its_worker_lives_on(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    pid = rig.worker().pid
    box: list[Result | RemoraError] = []
    handle = rig.pool.submit(infer(np.zeros(1, np.float32), model="slow"), box.append)
    rig.until(lambda: rig.worker().busy == 1)
    handle.cancel()
    handle.cancel()
    rig.until(lambda: box)
    assert type(box[0]) is CancelledError
    assert (rig.worker().pid, rig.worker().busy) == (pid, 0)
    assert rig.pool._arenas["t"].used == 0
    handle.cancel()


def test_a_job_that_waits_behind_others_can_be_cancelled_too(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    first = [rig.pool.submit(infer(np.zeros(1, np.float32), model="slow"), lambda _outcome: None) for _ in range(2)]
    box: list[Result | RemoraError] = []
    rig.pool.submit(infer(np.zeros(1, np.float32), model="slow"), box.append).cancel()
    for handle in first:
        handle.cancel()
    rig.until(lambda: box)
    assert type(box[0]) is CancelledError


def test_a_deadline_ends_a_job_in_time(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    started_s = time.monotonic()
    outcome = rig.run(infer(np.zeros(1, np.float32), model="slow", deadline_s=started_s + 0.2))
    assert type(outcome) is DeadlineExceededError
    assert time.monotonic() - started_s < 2.0


def test_a_job_that_no_request_stops_costs_its_worker_and_bystanders_are_answered(rig: Rig) -> None:
    rig.load(SHARED, rig.source("stubborn", stubborn_model()))
    rig.load(SHARED, rig.source("slow", slow_model(5.0)))
    pid = rig.worker().pid
    bystander = rig.submit(infer(np.full(1, 7, np.float32), model="slow"))
    stubborn = rig.submit(infer(np.zeros((1, 1), np.float32), model="stubborn", deadline_s=time.monotonic() + 0.2))
    rig.until(lambda: stubborn)
    assert type(stubborn[0]) is DeadlineExceededError
    rig.until(lambda: bystander)
    (result,) = bystander
    assert isinstance(result, Result)
    assert np.frombuffer(result.outputs[0].data, np.float32).tolist() == [7]
    result.release()
    # The bystander may have finished before the worker was killed: then nobody has waited for its successor yet.
    rig.until(lambda: [info for info in rig.pool.workers() if info.domain == SHARED and info.pid != pid])


def test_a_run_that_nobody_wants_does_not_end_a_worker_that_answers_others(rig: Rig) -> None:
    rig.load(SHARED, rig.source("stubborn", stubborn_model()))
    rig.load(SHARED, rig.source("identity", identity({})))
    pid = rig.worker().pid
    stubborn = rig.submit(
        infer(np.zeros((1, 1), np.float32), model="stubborn", tenant="evil", deadline_s=time.monotonic() + 0.1)
    )
    end_s = time.monotonic() + 1.5  # five times as long as a worker of a tenant's own would have
    while time.monotonic() < end_s and not stubborn:
        result = rig.run(infer(np.ones((1, 1, 1, 1), np.float32)))
        assert isinstance(result, Result)
        result.release()
    assert rig.worker().pid == pid
    rig.until(lambda: stubborn)  # it ends, or its worker does, now that nobody else has any use of that
    assert type(stubborn[0]) is DeadlineExceededError


# -- dying ------------------------------------------------------------------------------------------------------------


def test_a_job_in_flight_is_run_again_once_when_its_worker_is_killed(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(0.5)))
    box = rig.submit(infer(np.full(1, 3, np.float32), model="slow"))
    rig.until(lambda: rig.worker().busy == 1)
    os.kill(rig.worker().pid, signal.SIGKILL)
    rig.until(lambda: box)
    result = box[0]
    assert isinstance(result, Result)
    assert np.frombuffer(result.outputs[0].data, np.float32).tolist() == [3]
    assert rig.worker().restarts == 1
    assert rig.worker().models == ("slow",)


def test_a_model_that_was_loaded_survives_any_number_of_deaths(rig: Rig) -> None:
    rig.load(SHARED, rig.source("identity", identity({})))
    for round_number in range(1, 4):
        rig.until(lambda: any(info.domain == SHARED for info in rig.pool.workers()))
        os.kill(rig.worker().pid, signal.SIGKILL)
        rig.until(lambda number=round_number: [i for i in rig.pool.workers() if i.restarts == number])  # type: ignore[misc]
    result = rig.run(infer(np.ones((1, 1, 1, 1), np.float32)))
    assert isinstance(result, Result)
    result.release()


def test_a_model_that_kills_two_workers_while_it_loads_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = (
        "import sys, os, socket, json; control = socket.socket(fileno=int(sys.argv[3]))\n"
        "control.send(json.dumps({'t': 'hello'}).encode())\n"
        "while True:\n"
        "    if json.loads(control.recv(65536))['t'] == 'load': os._exit(1)\n"
    )
    monkeypatch.setattr("remora.workers.launcher.BOOT", boot)
    outcome = rig.load(SHARED, rig.source("identity", identity({})))
    assert type(outcome) is AbortedError
    assert "two workers died while they loaded this model" in str(outcome)


def test_a_job_that_kills_two_workers_is_aborted_and_the_third_worker_serves(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    rig.load(SHARED, rig.source("identity", identity({})))
    box = rig.submit(infer(np.zeros(1, np.float32), model="slow"))
    for _ in range(2):
        rig.until(lambda: box or any(info.busy for info in rig.pool.workers()))
        os.kill(rig.worker().pid, signal.SIGKILL)
        rig.until(lambda: box or not any(info.busy for info in rig.pool.workers()))
    rig.until(lambda: box)
    assert type(box[0]) is AbortedError
    assert "two workers died" in str(box[0])
    result = rig.run(infer(np.zeros((1, 1, 1, 1), np.float32)))
    assert isinstance(result, Result)
    result.release()


def test_a_job_that_ends_workers_takes_nobody_along_twice_and_its_tenant_may_not_go_on(rig: Rig) -> None:
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    rig.load(SHARED, rig.source("brief", slow_model(0.1)))

    def end_worker(*running: str) -> None:
        rig.until(lambda: sorted(one.job.model for one in rig.pool._domains[SHARED].jobs.values()) == sorted(running))
        pid = rig.worker().pid
        os.kill(pid, signal.SIGKILL)
        rig.until(lambda: not any(info.pid == pid for info in rig.pool.workers()))

    poison = rig.submit(infer(np.zeros(1, np.float32), model="slow", tenant="evil"))
    bystander = rig.submit(infer(np.full(1, 5, np.float32), model="brief", tenant="good"))
    end_worker("slow", "brief")
    later = rig.submit(infer(np.full(1, 6, np.float32), model="brief", tenant="good"))
    end_worker("slow")  # nobody runs beside the suspect
    rig.until(lambda: poison and bystander and later)
    assert type(poison[0]) is AbortedError
    for box in (bystander, later):
        assert isinstance(box[0], Result)
        box[0].release()
    for _ in range(FORGIVEN - 1):
        rig.pool._domains[SHARED]._blame.note("evil", time.monotonic())
    refused = rig.run(infer(np.zeros(1, np.float32), model="brief", tenant="evil"))
    assert isinstance(refused, ResourceExhaustedError)
    assert "have ended workers that others use" in str(refused)
    result = rig.run(infer(np.zeros(1, np.float32), model="brief", tenant="good"))
    assert isinstance(result, Result)
    result.release()


def test_a_worker_over_its_memory_fails_the_job_or_dies_but_the_agent_goes_on(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["input"], ["big"]), helper.make_node("ReduceSum", ["big"], ["output"])],
        "greedy",
        [helper.make_tensor_value_info("input", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )
    data = helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString()
    rig = Rig(tmp_path, standby=0, tenant_memory_bytes=3 << 30)
    try:
        rig.load("alice", rig.source("greedy", data))
        job = infer(np.asarray([1 << 31]), model="greedy", domain="alice", tenant="alice")
        assert isinstance(rig.run(job), ResourceExhaustedError | AbortedError | InvalidArgumentError)
        small = rig.run(infer(np.asarray([4]), model="greedy", domain="alice", tenant="alice"))
        assert isinstance(small, Result)
        small.release()
    finally:
        rig.close()


def test_closing_answers_what_is_in_flight_and_leaves_nothing(tmp_path: Path) -> None:
    before = _leftovers()
    rig = Rig(tmp_path, standby=1)
    rig.load(SHARED, rig.source("slow", slow_model(600)))
    box = rig.submit(infer(np.zeros(1, np.float32), model="slow"))
    rig.until(lambda: rig.worker().busy == 1)
    rig.pool.close()
    rig.reactor.run_once(0)
    assert type(box[0]) is UnavailableError
    rig.reactor.close()
    assert _leftovers() == before


def _leftovers() -> tuple[set[int], list[str]]:
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(int(fd))]
    return children, sorted(link for link in links if "memfd" in link)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_workers_that_cannot_start_are_an_error_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, standby=0, backoff_first_s=0.01)
    try:
        monkeypatch.setattr("remora.workers.launcher.BOOT", "raise SystemExit('no such module')")
        outcome = rig.load(SHARED, rig.source("identity", identity({})))
        assert type(outcome) is FailedPreconditionError
        assert "no such module" in str(outcome)
        monkeypatch.undo()
        assert isinstance(rig.load(SHARED, rig.source("identity", identity({}))), ModelSpec)
    finally:
        rig.close()


def test_without_confinement_it_works_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path, standby=0, confinement="none")
    try:
        rig.load(SHARED, rig.source("identity", identity({})))
        result = rig.run(infer(np.ones((1, 1, 1, 1), np.float32)))
        assert isinstance(result, Result)
        result.release()
    finally:
        rig.close()


def test_a_run_takes_as_many_threads_as_the_operator_says(rig: Rig) -> None:
    assert isinstance(rig.load(SHARED, rig.source("one", identity({}))), ModelSpec)
    process = psutil.Process(rig.worker().pid)
    rig.until(lambda: process.num_threads() == 3)  # for control and two for jobs; the one that loaded is gone
    many = rig.source("many", identity({}), manifest={"batching": {"threads": 64}})
    assert isinstance(rig.load(SHARED, many), ModelSpec)
    rig.until(lambda: process.num_threads() == 4)  # two are enough here, and one of them is the caller's
    array = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    answer = rig.run(infer(array, "many"))
    assert isinstance(answer, Result)
    assert np.frombuffer(answer.outputs[0].data, np.float32).tolist() == array.ravel().tolist()
    answer.release()
