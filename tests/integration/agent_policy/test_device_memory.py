"""A budget of device memory with real workers: models come and go, and no client notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent_process import AgentProcess, Guest, running_agent
from remora.errors import RemoraError, ResourceExhaustedError
from remora.wire import remora_v1

MIB = 1 << 20
BUDGET = 66 * MIB
#: Two of these fit into the budget, three do not.
SIZES = {"a": 12, "b": 12, "c": 12, "huge": 70}


def heavy_model(mebibytes: int, seed: int) -> bytes:
    """Return a model of float32 [N, 4] that adds up its products with so large a matrix: its answers tell it apart."""
    columns = mebibytes * MIB // 16
    weights = np.full((4, columns), 1.0 + seed, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["input", "weights"], ["product"]),
            helper.make_node("ReduceMax", ["product"], ["output"], axes=[1], keepdims=1),
        ],
        "heavy",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(weights, "weights")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    models = tmp_path_factory.mktemp("models")
    for seed, (name, size) in enumerate(SIZES.items()):
        directory = models / name
        directory.mkdir()
        (directory / "model.onnx").write_bytes(heavy_model(size, seed))
        (directory / "manifest.toml").write_text(f'name = "{name}"\ntask = "tensor"\n')
    config = f"[workers]\ndevice_memory_bytes = {BUDGET}\ncalibrate_ms = 0\n"
    with running_agent(tmp_path_factory.mktemp("a"), config=config, models=models) as running:
        yield running


def ask(guest: Guest, model: str) -> float:
    tensor = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 4], data=np.ones(4, np.float32).tobytes())
    request = remora_v1.InferRequest(model=model, inputs=[tensor])
    answer = guest.call("Infer", request, remora_v1.InferResponse)
    return float(np.frombuffer(answer.outputs[0].data, np.float32)[0])


def expected(model: str) -> float:
    return 4.0 * (1 + list(SIZES).index(model))


def test_more_models_than_fit_are_all_answered_one_after_the_other(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        for model in "abcabcab":
            assert ask(guest, model) == expected(model)
    assert "model unloaded to make room" in agent.log


def test_clients_of_more_models_than_fit_see_no_error_while_all_are_busy(agent: AgentProcess) -> None:
    end_s = time.monotonic() + 4.0
    answers: dict[str, int] = dict.fromkeys("abc", 0)
    errors: list[BaseException] = []

    def work(model: str) -> None:
        try:
            with Guest(agent.connect()) as guest:
                while time.monotonic() < end_s:
                    assert ask(guest, model) == expected(model)
                    answers[model] += 1
        except (RemoraError, AssertionError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in "abc" for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"\nanswers: {answers}")
    assert not errors
    assert min(answers.values()) > 0


def test_a_model_larger_than_the_budget_is_refused_by_name_and_size(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        with pytest.raises(ResourceExhaustedError, match=rf"model huge takes \d+ bytes.*{BUDGET} on cpu"):
            ask(guest, "huge")
        assert ask(guest, "a") == expected("a")
