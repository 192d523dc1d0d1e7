"""TorchScript on PyTorch; importing this needs `remora[torch]`.

A TorchScript file is a program: the loader unpickles and compiles what is in it, and its checks were bypassed before
(CVE-2025-32434, CVE-2026-24747). It comes here only if the operator's manifest pins it, or into the confined worker of
a tenant whom policy lets run native code (docs/decisions/0010-torchscript-is-a-program.md).

The file names its inputs, but not their types and sizes: those are open (`Spec` with no dtype), and the outputs are
called `output0`, `output1`, ... A run cannot be stopped: one past its deadline ends with its worker.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from remora.backends.contract import Array, Exposure, Limits, Spec, Stop
from remora.errors import CancelledError, InvalidArgumentError, RemoraError, ResourceExhaustedError

MAGIC = b"PK\x03\x04"
_MOST_TEXT = 400


def choose_device(device: str, gpus: int) -> str:
    """Return the device for `auto`, `cpu` or `cuda:N` on a machine where PyTorch sees `gpus` GPUs.

    Raises:
        InvalidArgumentError: there is no such device.
    """
    if device == "auto":
        return "cuda:0" if gpus else "cpu"
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not index.isdigit() or int(index) >= gpus):
        raise InvalidArgumentError(
            f"there is no device {device!r}: PyTorch sees {gpus} GPUs", fix="use auto, cpu or cuda:N"
        )
    return device


class TorchModel:
    """One script module, called from all threads of a worker."""

    def __init__(self, module: Any, device: str, memory_bytes: int) -> None:
        self._module = module
        self.device = device
        self.memory_bytes = memory_bytes
        self.exposure = Exposure()
        schema = module.forward.schema
        needed = [argument for argument in schema.arguments[1:] if not argument.has_default_value()]  # 0 is the module
        self.inputs = tuple(Spec(argument.name, "", ()) for argument in needed)
        returned = schema.returns[0].type
        kinds = returned.elements() if returned.kind() == "TupleType" else [returned]
        self.outputs = tuple(Spec(f"output{index}", "", ()) for index in range(len(kinds)))
        if {kind.kind() for kind in (*(argument.type for argument in needed), *kinds)} != {"TensorType"}:
            raise InvalidArgumentError(
                f"only tensors come and go, and the module is {schema}"[:_MOST_TEXT],
                fix="wrap it in a module that takes tensors and returns a tensor or a tuple of them",
            )

    def check(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> tuple[str, ...]:
        inputs, outputs = [spec.name for spec in self.inputs], [spec.name for spec in self.outputs]
        if set(feeds) != set(inputs):
            raise InvalidArgumentError(f"the inputs are {', '.join(feeds)}", fix=f"the model takes {', '.join(inputs)}")
        for name in wanted:
            if name not in outputs:
                raise InvalidArgumentError(
                    f"the model has no output named {name!r}", fix=f"it has {', '.join(outputs)}"
                )
        return tuple(wanted) or tuple(outputs)

    def plan(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> None:
        return None

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str], stop: Stop, into: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        if stop.requested:
            raise CancelledError("the run was stopped")
        try:
            with torch.inference_mode():
                given = [torch.from_numpy(feeds[spec.name]).to(self.device) for spec in self.inputs]
                answer = self._module(*given)
                answers = answer if isinstance(answer, tuple) else (answer,)
                places = [int(name.removeprefix("output")) for name in wanted]
                computed = [answers[place].cpu().contiguous().numpy() for place in places]
        except (RuntimeError, TypeError, MemoryError) as error:
            raise _refused("run", error) from error
        if into is None:
            return computed
        for target, array in zip(into, computed, strict=True):
            np.copyto(target, array)
        return into


def _refused(what: str, error: Exception) -> RemoraError:
    # The interpreter's traceback comes first, what happened last.
    text = (str(error).strip().splitlines() or [type(error).__name__])[-1][:_MOST_TEXT]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return ResourceExhaustedError(f"the model needs more memory than its worker may use: {text}")
    return InvalidArgumentError(f"PyTorch cannot {what} the model: {text}", fix="check the inputs against the model")


class TorchBackend:
    """The backend for TorchScript files, as `torch.jit.save` writes them."""

    name = "torchscript"
    version = f"torch {torch.__version__}"

    def __init__(self) -> None:
        torch.set_num_threads(1)  # as with ONNX: requests run beside one another instead

    def load(self, data: bytes, device: str, limits: Limits, threads: int = 1) -> TorchModel:
        if len(data) > limits.model_bytes:
            raise InvalidArgumentError(f"the model file has {len(data)} bytes, {limits.model_bytes} are allowed")
        if not data.startswith(MAGIC):
            raise InvalidArgumentError("the file is not a TorchScript archive", fix="write it with torch.jit.save")
        chosen = choose_device(device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        try:
            with warnings.catch_warnings():
                for kind in (DeprecationWarning, FutureWarning):  # of TorchScript as such
                    warnings.simplefilter("ignore", kind)
                module = torch.jit.load(io.BytesIO(data), map_location=chosen).eval()
        except (RuntimeError, ValueError, MemoryError) as error:
            raise _refused("load", error) from error
        return TorchModel(module, chosen, len(data))
