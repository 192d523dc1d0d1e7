"""PyTorch's service: models by position, tensors with PyTorch's element types."""

from __future__ import annotations

import errno
from enum import IntEnum

from remora.vaccel import link, tensors
from remora.vaccel.errors import FFIError
from remora.wire import vaccel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, List, Mapping, Optional, Sequence

    from remora.vaccel.resource import Resource


class TensorType(IntEnum):
    """BYTE is uint8, CHAR int8, HALF float16, FLOAT float32; there is no double."""

    UNUSED = 0
    BYTE = 1
    CHAR = 2
    SHORT = 3
    INT = 4
    LONG = 5
    HALF = 6
    FLOAT = 7


class Tensor(tensors.Tensor):
    __slots__ = ()
    DTYPES: ClassVar[Mapping[int, str]] = {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        6: "float16",
        7: "float32",
    }
    TENSOR_TYPE: ClassVar[Any] = TensorType


class TorchMixin:
    """PyTorch's operations of a `Session`."""

    remote_id: int

    def torch_model_load(self, resource: Resource) -> None:
        """Load a registered model.

        Raises:
            FFIError: it is no model, is not registered, or cannot be loaded.
        """
        request = vaccel.TorchModelLoadRequest(session_id=self.remote_id, model_id=resource.remote_id)
        link.call("TorchModelLoad", request, vaccel.Empty)

    def torch_model_run(
        self,
        resource: Resource,
        in_tensors: Sequence[Tensor],
        nr_out_tensors: int = 1,
        run_options: Optional[Any] = None,
    ) -> List[Tensor]:
        """Run a loaded model on tensors in the order of its inputs; returns its first outputs.

        Raises:
            FFIError: the model refused.
        """
        request = vaccel.TorchModelRunRequest(
            session_id=self.remote_id,
            model_id=resource.remote_id,
            run_options=run_options,
            in_tensors=[tensor.to_wire(vaccel.TorchTensor) for tensor in in_tensors],
            nr_out_tensors=nr_out_tensors,
        )
        out = link.call("TorchModelRun", request, vaccel.TorchModelRunResponse).out_tensors
        if len(out) != nr_out_tensors:
            raise FFIError(errno.EPROTO, f"the agent answered with {len(out)} tensors, not {nr_out_tensors}")
        return [Tensor.from_wire(tensor) for tensor in out]
