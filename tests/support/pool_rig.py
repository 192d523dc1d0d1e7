"""A reactor with a pool of real workers, jobs and small models for it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from remora.errors import RemoraError
from remora.reactor import Reactor
from remora.workers.contract import SHARED, Job, ModelSource, ModelSpec, Result, TensorView, WorkerInfo
from remora.workers.pool import WorkerPool
from remora.workers.settings import WorkerSettings

OPSET = [helper.make_opsetid("", 17)]
PATIENCE_S = 20.0


class Rig:
    """A reactor with a pool, and the waiting that a test needs."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.errors: list[BaseException] = []
        self.reactor = Reactor(self.errors.append)
        self.pool = WorkerPool(self.reactor, WorkerSettings(device="cpu", threads=2, **settings))
        self.directory = directory

    def until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, "it did not happen in time"
            self.reactor.run_once(0.1)
        assert self.errors == []

    def source(self, name: str, data: bytes, **more: Any) -> ModelSource:
        path = self.directory / f"{name}.onnx"
        path.write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return ModelSource(**{"key": name, "digest": digest, "path": path, "format": "onnx", **more})

    def load(self, domain: str, source: ModelSource) -> ModelSpec | RemoraError:
        box: list[ModelSpec | RemoraError] = []
        self.pool.load(domain, source, box.append)
        assert box == [], "done is never called from within the call"
        self.until(lambda: box)
        return box[0]

    def submit(self, job: Job) -> list[Result | RemoraError]:
        box: list[Result | RemoraError] = []
        self.pool.submit(job, box.append)
        assert box == [], "done is never called from within the call"
        return box

    def run(self, job: Job) -> Result | RemoraError:
        box = self.submit(job)
        self.until(lambda: box)
        return box[0]

    def worker(self, domain: str = SHARED) -> WorkerInfo:
        (found,) = [info for info in self.pool.workers() if info.domain == domain]
        return found

    def close(self) -> None:
        self.pool.close()
        self.reactor.close()


def tensor(array: np.ndarray[Any, Any], name: str = "input") -> TensorView:
    return TensorView(name, array.dtype.name, array.shape, memoryview(array.tobytes()))


def infer(array: np.ndarray[Any, Any], model: str = "identity", **more: Any) -> Job:
    values: dict[str, Any] = {"operation": "infer", "domain": SHARED, "tenant": "t", "model": model}
    return Job(**{**values, "inputs": (tensor(array),), **more})


def slow_model(seconds: float) -> bytes:
    """Return a model that loops for about so long (2 million rounds a second at most), then passes its input on."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Mul", ["v", "one"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["most", "yes", "input"], ["output"], body=body)],
        "slow",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])],
        [
            numpy_helper.from_array(np.asarray(int(seconds * 300_000)), "most"),
            numpy_helper.from_array(np.asarray(True), "yes"),
            numpy_helper.from_array(np.ones(1, np.float32), "one"),
        ],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


def rows_model(rounds: int = 0) -> bytes:
    """Return a model of float32 [N, 4] that doubles its input after `rounds` of work that are dear for any N alike."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Mul", ["v", "one"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["most", "yes", "input"], ["same"], body=body),
            helper.make_node("Add", ["same", "input"], ["output"]),
        ],
        "rows",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 4])],
        [
            numpy_helper.from_array(np.asarray(rounds), "most"),
            numpy_helper.from_array(np.asarray(True), "yes"),
            numpy_helper.from_array(np.ones(1, np.float32), "one"),
        ],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


def brightest_model() -> bytes:
    """Return a classifier of float32 [N, 3, 8, 8]: its three scores are the means of red, green and blue."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["input"], ["output"], axes=[2, 3], keepdims=0)],
        "brightest",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 3])],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


def table_model() -> bytes:
    """Return a model of int64 [N, 1] that looks rows up in a table of ten: an index beyond it fails the run."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input"], ["output"])],
        "table",
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["N", 1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.arange(10, dtype=np.float32), "table")],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())


def mean_model() -> bytes:
    """Return a model of float32 [N, 4] whose rows are no rows: each answer depends on all of them."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["input", "mean"], ["output"]),
        ],
        "mean",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 4])],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString())
