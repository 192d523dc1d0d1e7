"""ONNX models on ONNX Runtime.

Loading a model is a security border (measured on ONNX Runtime 1.32): a model loaded from bytes may still name *external
data* as a file in the current directory and have its content come back as an output. So a file is parsed and vetted
first, is loaded from bytes, and the worker's directory is empty.

Official wheels of ONNX Runtime start a telemetry thread on import unless `ORT_DISABLE_TELEMETRY=1` is set before.
One thread for a run unless the manifest says otherwise: one session called from several threads reaches 268 images/s
on two cores where a session of two threads reaches 219 to 247; a lone run takes 7.4 ms with one, 4.7 ms with two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime as ort

from remora.backends.contract import Array, Exposure, Limits, Spec, Stop
from remora.backends.onnx_exposure import exposure
from remora.backends.signature import Signature
from remora.errors import CancelledError, InvalidArgumentError, RemoraError, ResourceExhaustedError

#: Operator sets whose kernels ship with ONNX Runtime and do nothing but compute.
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
#: ONNX Runtime's type names -> numpy's. What is missing here (strings, sequences, maps) is refused.
_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}
_FIX_MODEL = "export the model again with its weights inside the file"
_MAX_DEPTH = 16


def providers(device: str) -> tuple[list[Any], str]:
    """Return ONNX Runtime's execution providers for `auto`, `cpu` or `cuda:N`, and the device they stand for.

    Raises:
        InvalidArgumentError: the device does not exist here.
    """
    available = ort.get_available_providers()
    if device == "cpu" or (device == "auto" and "CUDAExecutionProvider" not in available):
        return ["CPUExecutionProvider"], "cpu"
    if device == "auto":
        device = "cuda:0"
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise InvalidArgumentError(f"unknown device {device!r}", fix="use auto, cpu or cuda:N")
    if "CUDAExecutionProvider" not in available:
        raise InvalidArgumentError(
            f"device {device!r} needs an ONNX Runtime with CUDA; this one has {', '.join(available)}",
            fix="install onnxruntime-gpu, or use device cpu",
        )
    options = {"device_id": index}
    chosen: list[Any] = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    if "TensorrtExecutionProvider" in available:
        chosen.insert(0, ("TensorrtExecutionProvider", options))
    return chosen, device


# -- vetting ----------------------------------------------------------------------------------------------------------


def vet(data: bytes, limits: Limits) -> Any:
    """Return the parsed model (`onnx.ModelProto`, which has no types), or refuse the file.

    It is refused if it is not self-contained, uses unknown operators, or is out of bounds.

    Raises:
        InvalidArgumentError: what is wrong with the file.
    """
    if len(data) > limits.model_bytes:
        raise InvalidArgumentError(f"the model file has {len(data)} bytes, {limits.model_bytes} are allowed")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # the parser's own error class depends on protobuf's implementation
        raise InvalidArgumentError(
            f"the file is not an ONNX model ({len(data)} bytes)", fix="upload a .onnx file"
        ) from error
    if not model.HasField("graph") or not model.graph.node:
        raise InvalidArgumentError("the file is not an ONNX model: it has no graph", fix="upload a .onnx file")
    for opset in [*model.opset_import, *(item for function in model.functions for item in function.opset_import)]:
        if opset.domain not in DOMAINS and opset.domain not in {function.domain for function in model.functions}:
            raise InvalidArgumentError(
                f"the model uses operator domain {opset.domain!r}; allowed are the default domain and ai.onnx.ml",
                fix="export it with standard ONNX operators",
            )
    if model.training_info:
        raise InvalidArgumentError("the model holds training information", fix="export it for inference")
    for nodes, (node, attribute_tensors) in enumerate(_walk(model), start=1):
        if nodes > limits.nodes:
            raise InvalidArgumentError(f"the model has more than {limits.nodes} nodes")
        if node is not None and node.domain not in DOMAINS and not _is_local(model, node):
            raise InvalidArgumentError(f"operator {node.domain}.{node.op_type} is not allowed")
        for tensor in attribute_tensors:
            if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise InvalidArgumentError(
                    f"tensor {tensor.name!r} keeps its data outside the model file, which is not allowed",
                    fix=_FIX_MODEL,
                )
    return model


def _is_local(model: Any, node: Any) -> bool:
    return any((node.domain, node.op_type) == (function.domain, function.name) for function in model.functions)


def _walk(model: Any) -> Iterator[tuple[Any | None, list[Any]]]:
    """Yield every node with the tensors in its attributes, and (None, tensors) for every graph's own tensors."""
    pending: list[tuple[Any, int]] = [(model.graph, 0)]
    bodies: list[Any] = [(function.node, 0) for function in model.functions]
    for function in model.functions:
        yield None, _attribute_tensors(function.attribute_proto, pending, 0)
    while pending or bodies:
        if pending:
            graph, depth = pending.pop()
            if depth > _MAX_DEPTH:
                raise InvalidArgumentError(f"the model nests graphs more than {_MAX_DEPTH} deep")
            sparse = [part for item in graph.sparse_initializer for part in (item.values, item.indices)]
            yield None, [*graph.initializer, *sparse]
            nodes = graph.node
        else:
            nodes, depth = bodies.pop()
        for node in nodes:
            yield node, _attribute_tensors(node.attribute, pending, depth)


def _attribute_tensors(attributes: Any, pending: list[tuple[Any, int]], depth: int) -> list[Any]:
    tensors: list[Any] = []
    for attribute in attributes:
        if attribute.HasField("t"):
            tensors.append(attribute.t)
        tensors.extend(attribute.tensors)
        sparse = list(attribute.sparse_tensors)
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        tensors.extend(part for item in sparse for part in (item.values, item.indices))
        if attribute.HasField("g"):
            pending.append((attribute.g, depth + 1))
        pending.extend((graph, depth + 1) for graph in attribute.graphs)
    return tensors


# -- running ----------------------------------------------------------------------------------------------------------


class OnnxModel:
    """One session, shared by all threads of a worker."""

    def __init__(self, session: Any, device: str, memory_bytes: int, exposed: Exposure) -> None:
        self._session = session
        self.exposure = exposed
        self.device = device
        self.memory_bytes = memory_bytes
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        # Symbolic dimensions ("N") that inputs and outputs share make most output shapes known before the run.
        self._symbols = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        self._signature = Signature(self.inputs, self.outputs)

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        return self._signature.check(feeds, wanted)

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[Spec, ...] | None:
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for symbol, size in zip(self._symbols[spec.name], feeds[spec.name].shape, strict=True):
                if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                    return None
        planned = []
        for name in wanted:
            shape = tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in self._symbols[name])
            if any(not isinstance(dim, int) or dim < 0 for dim in shape):
                return None
            planned.append(Spec(name, self._signature.output[name].dtype, shape))
        return tuple(planned)

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        options = ort.RunOptions()
        # run_with_iobinding looks for it, and an exception takes 30 us if it is not there; -1 is what it assumes then.
        options.add_run_config_entry("gpu_graph_id", "-1")
        stop.attach(lambda: setattr(options, "terminate", True))
        try:
            if into is None:
                computed: Sequence[Array] = self._session.run(list(wanted), dict(feeds), options)
                return computed
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, array in zip(wanted, into, strict=True):
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            return into
        except Exception as error:  # ONNX Runtime's classes share no base but Exception
            raise _translate(error, stop) from error


def _translate(error: Exception, stop: Stop) -> RemoraError:
    if stop.requested:
        return CancelledError("the run was stopped")
    text = _first_line(error)
    if isinstance(error, MemoryError) or "Failed to allocate memory" in text or "bad_alloc" in text:
        return ResourceExhaustedError(f"the model needs more memory than its worker may use: {text}")
    return InvalidArgumentError(f"the model refused to run: {text}", fix="check the inputs against the model")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:400]


def _spec(value: Any) -> Spec:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise InvalidArgumentError(
            f"{value.name!r} has type {value.type}; allowed are {', '.join(sorted(_DTYPES.values()))} tensors"
        )
    return Spec(value.name, dtype, tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in value.shape))


class OnnxBackend:
    """The backend for `.onnx` files."""

    name = "onnx"
    version = f"onnxruntime {ort.__version__}"

    def load(self, data: bytes, device: str, limits: Limits, threads: int = 1) -> OnnxModel:
        exposed = exposure(vet(data, limits))
        chosen, used = providers(device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # they have no core to themselves
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(data, options, providers=chosen)
        except Exception as error:  # ONNX Runtime's classes share no base but Exception
            raise InvalidArgumentError(
                f"ONNX Runtime cannot load the model: {_first_line(error)}", fix="check it with onnx.checker"
            ) from error
        if used != "cpu" and "CUDAExecutionProvider" not in session.get_providers():
            used = "cpu"  # ONNX Runtime falls back by itself when the driver does not answer
        model = OnnxModel(session, used, memory_bytes=len(data), exposed=exposed)
        if not all(np.dtype(spec.dtype).itemsize for spec in (*model.inputs, *model.outputs)):
            raise InvalidArgumentError("the model has an input or output without a size")
        return model
