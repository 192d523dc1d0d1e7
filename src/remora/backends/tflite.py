"""TensorFlow Lite models on LiteRT; importing this needs `remora[tflite]`.

A model file is data and known operators, but its parser has had memory faults: an uploaded one is loaded in its
tenant's own confined worker only. An interpreter runs one request at a time, so a model keeps as many as were ever
needed at once. LiteRT cannot be stopped inside a run: a run past its deadline ends with its worker.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from remora.backends.contract import Array, Exposure, Limits, Spec, Stop
from remora.backends.signature import Signature
from remora.errors import CancelledError, InvalidArgumentError, ResourceExhaustedError
from remora.wire.remora_v1 import DTYPES

#: Where a model file says what it is (FlatBuffers: an identifier behind the root's offset).
MAGIC, MAGIC_AT = b"TFL3", 4
_MOST_TEXT = 400


class TfliteModel:
    """One model with its interpreters."""

    device = "cpu"

    def __init__(self, data: bytes, threads: int) -> None:
        self._data = data
        self._threads = threads
        first = self._interpreter()
        self.inputs = tuple(_spec(detail) for detail in first.get_input_details())
        self.outputs = tuple(_spec(detail) for detail in first.get_output_details())
        self.memory_bytes = len(data)
        self._signature = Signature(self.inputs, self.outputs)
        # Inputs are copied before they are looked at, outputs once they are whole.
        self.exposure = Exposure(*(frozenset(spec.name for spec in specs) for specs in (self.inputs, self.outputs)))
        self._fixed = all(size >= 0 for spec in self.inputs for size in spec.shape)
        self._lock = threading.Lock()
        self._free = [first]

    def _interpreter(self) -> Any:
        try:
            interpreter = Interpreter(model_content=self._data, num_threads=self._threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError, MemoryError) as error:
            raise _refused("load", error) from error
        return interpreter

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        return self._signature.check(feeds, wanted)

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[Spec, ...] | None:
        return self._signature.fixed(wanted) if self._fixed else None

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        if stop.requested:
            raise CancelledError("the run was stopped")
        with self._lock:
            interpreter = self._free.pop() if self._free else None
        interpreter = interpreter or self._interpreter()
        try:
            computed = self._invoke(interpreter, feeds, wanted)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise _refused("run", error) from error  # and this interpreter is not used again
        with self._lock:
            self._free.append(interpreter)
        if into is None:
            return computed
        for target, array in zip(into, computed, strict=True):
            np.copyto(target, array)
        return into

    @staticmethod
    def _invoke(interpreter: Any, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        resized = False
        for detail in interpreter.get_input_details():
            shape = feeds[detail["name"]].shape
            if tuple(detail["shape"]) != shape:
                interpreter.resize_tensor_input(detail["index"], shape, strict=True)
                resized = True
        if resized:
            interpreter.allocate_tensors()
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], feeds[detail["name"]])
        interpreter.invoke()
        places = {detail["name"]: detail["index"] for detail in interpreter.get_output_details()}
        return [interpreter.get_tensor(places[name]) for name in wanted]


def _refused(what: str, error: Exception) -> InvalidArgumentError | ResourceExhaustedError:
    text = str(error).strip().partition("\n")[0][:_MOST_TEXT]
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return ResourceExhaustedError(f"the model needs more memory than its worker may use: {text}")
    return InvalidArgumentError(f"LiteRT cannot {what} the model: {text}", fix="use operators that LiteRT has")


def _spec(detail: Mapping[str, Any]) -> Spec:
    dtype = np.dtype(detail["dtype"]).name
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"{detail['name']!r} has type {dtype}; allowed are {', '.join(DTYPES)}")
    signature = detail["shape_signature"]
    return Spec(detail["name"], dtype, tuple(int(size) for size in (signature if len(signature) else detail["shape"])))


def _installed_version() -> str:
    """Return what the package's metadata says: measurements are kept for a version, and the library tells none."""
    try:
        return version("ai-edge-litert")
    except PackageNotFoundError:  # a worker sees only packages, not always what lies beside them
        return "of unknown version"


class TfliteBackend:
    """The backend for `.tflite` files."""

    name = "tflite"
    version = f"litert {_installed_version()}"

    def load(self, data: bytes, device: str, limits: Limits, threads: int = 1) -> TfliteModel:
        if len(data) > limits.model_bytes:
            raise InvalidArgumentError(f"the model file has {len(data)} bytes, {limits.model_bytes} are allowed")
        if data[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
            raise InvalidArgumentError("the file is not a TensorFlow Lite model", fix="upload a .tflite file")
        return TfliteModel(data, threads)
