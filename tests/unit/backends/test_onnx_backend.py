"""Running ONNX models: checks of inputs, known and unknown output sizes, stopping, and no telemetry."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pool_rig import slow_model
from remora.backends.contract import Limits, Spec, Stop
from remora.backends.noop import NoopBackend
from remora.backends.onnx import OnnxBackend, OnnxModel, providers
from remora.catalog.architectures import identity
from remora.errors import CancelledError, InvalidArgumentError

OPSET = [helper.make_opsetid("", 17)]


def load(data: bytes) -> OnnxModel:
    return OnnxBackend().load(data, "cpu", Limits())


@pytest.fixture(scope="module")
def same() -> OnnxModel:
    return load(identity({}))


def nonzero() -> bytes:
    """Return a model whose output's size depends on the values of its input."""
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1, "found"])],
    )
    model = helper.make_model(graph, opset_imports=OPSET, ir_version=8)
    return bytes(model.SerializeToString())


def test_inputs_and_outputs_are_described_with_open_dimensions(same: OnnxModel) -> None:
    assert same.inputs == (Spec("input", "float32", (-1, -1, -1, -1)),)
    assert same.outputs == (Spec("output", "float32", (-1, -1, -1, -1)),)
    assert same.device == "cpu"


def test_shared_symbols_make_an_open_output_size_known_before_the_run(same: OnnxModel) -> None:
    feeds = {"input": np.zeros((2, 3, 5, 7), np.float32)}
    assert same.plan(feeds, ("output",)) == (Spec("output", "float32", (2, 3, 5, 7)),)


def test_outputs_are_computed_into_the_given_memory(same: OnnxModel) -> None:
    given = np.random.default_rng(1).random((1, 3, 224, 224), np.float32)
    into = np.zeros_like(given)
    same.run({"input": given}, ("output",), Stop(), [into])
    assert np.array_equal(given, into)


def test_an_input_at_an_odd_address_is_as_good(same: OnnxModel) -> None:
    raw = bytearray(1 + 4 * 16)
    given: Any = np.frombuffer(raw, np.float32, 16, offset=1).reshape(1, 1, 4, 4)
    given[...] = 7
    into = np.zeros((1, 1, 4, 4), np.float32)
    same.run({"input": given}, ("output",), Stop(), [into])
    assert np.array_equal(given, into)
    assert np.array_equal(same.run({"input": given}, ("output",), Stop())[0], given)


def test_a_size_that_only_running_tells_is_not_planned() -> None:
    model = load(nonzero())
    feeds = {"x": np.asarray([0, 1, 0, 1, 0, 0, 0, 1], np.float32)}
    assert model.plan(feeds, ("y",)) is None
    assert model.run(feeds, ("y",), Stop())[0].tolist() == [[1, 3, 7]]


@pytest.mark.parametrize(
    ("feeds", "wanted", "message"),
    [
        ({}, (), "input 'input' is missing"),
        ({"input": np.zeros((1, 1, 1, 1))}, (), "is float64"),
        ({"input": np.zeros((1, 1), np.float32)}, (), r"\[1, 1\]"),
        ({"input": np.zeros((1, 1, 1, 1), np.float32), "more": np.zeros(1)}, (), "no input named more"),
        ({"input": np.zeros((1, 1, 1, 1), np.float32)}, ("other",), "no output named 'other'"),
    ],
)
def test_wrong_inputs_are_named_with_what_the_model_wants(
    same: OnnxModel, feeds: Any, wanted: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        same.check(feeds, wanted)
    assert "float32[any, any, any, any]" in (caught.value.fix or "")


def test_a_run_that_does_not_end_is_stopped() -> None:
    model, stop, outcome = load(slow_model(1 << 40)), Stop(), []

    def run() -> None:
        try:
            model.run({"input": np.zeros(1, np.float32)}, ("output",), stop)
        except CancelledError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    stop.request()
    thread.join(10)
    assert not thread.is_alive()
    assert len(outcome) == 1


def test_a_stop_before_the_run_stops_it_too() -> None:
    model, stop = load(slow_model(1 << 40)), Stop()
    stop.request()
    with pytest.raises(CancelledError):
        model.run({"input": np.zeros(1, np.float32)}, ("output",), stop)


def test_a_device_that_is_not_there_is_an_error_with_the_fix() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown device"):
        providers("abacus")
    if "CUDAExecutionProvider" not in str(providers("auto")):
        with pytest.raises(InvalidArgumentError, match="needs an ONNX Runtime with CUDA"):
            providers("cuda:0")


CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("available", "device", "expected", "used"),
    [
        ([CPU], "auto", [CPU], "cpu"),
        ([CPU], "cpu", [CPU], "cpu"),
        ([CUDA, CPU], "cpu", [CPU], "cpu"),
        ([CUDA, CPU], "auto", [(CUDA, {"device_id": "0"}), CPU], "cuda:0"),
        ([CUDA, CPU], "cuda:3", [(CUDA, {"device_id": "3"}), CPU], "cuda:3"),
        (
            [TENSORRT, CUDA, CPU],
            "cuda:1",
            [(TENSORRT, {"device_id": "1"}), (CUDA, {"device_id": "1"}), CPU],
            "cuda:1",
        ),
    ],
)
def test_the_fastest_providers_come_first_and_the_cpu_last(
    monkeypatch: pytest.MonkeyPatch, available: list[str], device: str, expected: list[Any], used: str
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    assert providers(device) == (expected, used)


@pytest.mark.parametrize("device", ["cuda", "cuda:", "cuda:-1", "cuda:0x1", "tpu:0", ""])
def test_a_device_without_a_number_is_unknown_wherever_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(InvalidArgumentError, match="unknown device"):
        providers(device)


def test_a_gpu_whose_driver_does_not_answer_is_not_said_to_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = ort.InferenceSession

    def fallen_back(data: bytes, options: Any, providers: list[Any]) -> Any:
        asked.append(providers)
        return real(data, options, providers=[CPU])  # as ONNX Runtime does by itself

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", fallen_back)
    assert OnnxBackend().load(identity({}), "auto", Limits()).device == "cpu"
    assert asked == [[(CUDA, {"device_id": "0"}), CPU]]


def test_importing_the_backend_starts_no_telemetry(tmp_path: Any) -> None:
    code = "import remora.backends.onnx, threading, os; print(len(os.listdir('/proc/self/task')))"
    environment = {"HOME": str(tmp_path), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert not any(tmp_path.iterdir())


def test_noop_answers_nothing() -> None:
    model = NoopBackend().load(b"", "cpu", Limits())
    assert model.run({}, model.check({}, ()), Stop()) == ()
    assert model.plan({}, ()) == ()
