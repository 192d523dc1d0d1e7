"""TensorFlow Lite's service: models by position, element types by the numbers of TensorFlow Lite's C library."""

from __future__ import annotations

import errno
from enum import IntEnum

from remora.vaccel import link, tensors
from remora.vaccel.errors import FFIError
from remora.wire import vaccel
from remora.wire import vaccel_enums as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, List, Mapping, Sequence, Tuple

    from remora.vaccel.resource import Resource


class TensorType(IntEnum):
    NOTYPE = wire.TfliteDataType.NOTYPE
    FLOAT32 = wire.TfliteDataType.FLOAT32
    INT32 = wire.TfliteDataType.INT32
    UINT8 = wire.TfliteDataType.UINT8
    INT64 = wire.TfliteDataType.INT64
    STRING = wire.TfliteDataType.STRING
    BOOL = wire.TfliteDataType.BOOL
    INT16 = wire.TfliteDataType.INT16
    COMPLEX64 = wire.TfliteDataType.COMPLEX64
    INT8 = wire.TfliteDataType.INT8
    FLOAT16 = wire.TfliteDataType.FLOAT16
    FLOAT64 = wire.TfliteDataType.FLOAT64
    COMPLEX128 = wire.TfliteDataType.COMPLEX128
    UINT64 = wire.TfliteDataType.UINT64
    RESOURCE = wire.TfliteDataType.RESOURCE
    VARIANT = wire.TfliteDataType.VARIANT
    UINT32 = wire.TfliteDataType.UINT32
    UINT16 = wire.TfliteDataType.UINT16
    INT4 = wire.TfliteDataType.INT4


class Tensor(tensors.Tensor):
    __slots__ = ()
    DTYPES: ClassVar[Mapping[int, str]] = {
        TensorType.FLOAT32: "float32",
        TensorType.INT32: "int32",
        TensorType.UINT8: "uint8",
        TensorType.INT64: "int64",
        TensorType.BOOL: "bool",
        TensorType.INT16: "int16",
        TensorType.INT8: "int8",
        TensorType.FLOAT16: "float16",
        TensorType.FLOAT64: "float64",
        TensorType.UINT64: "uint64",
        TensorType.UINT32: "uint32",
        TensorType.UINT16: "uint16",
    }
    TENSOR_TYPE: ClassVar[Any] = TensorType


class TFLiteMixin:
    """TensorFlow Lite's operations of a `Session`."""

    remote_id: int

    def tflite_model_load(self, resource: Resource) -> None:
        """Load a registered model.

        Raises:
            FFIError: it cannot be loaded.
        """
        request = vaccel.TfliteModelLoadRequest(session_id=self.remote_id, model_id=resource.remote_id)
        link.call("TensorflowLiteModelLoad", request, vaccel.Empty)

    def tflite_model_unload(self, resource: Resource) -> None:
        """Undo `tflite_model_load`.

        Raises:
            FFIError: it is not loaded.
        """
        request = vaccel.TfliteModelUnloadRequest(session_id=self.remote_id, model_id=resource.remote_id)
        link.call("TensorflowLiteModelUnload", request, vaccel.Empty)

    def tflite_model_run(
        self, resource: Resource, in_tensors: Sequence[Tensor], nr_out_tensors: int = 1
    ) -> Tuple[List[Tensor], int]:
        """Run a loaded model on tensors in the order of its inputs; returns its first outputs and a status code.

        Raises:
            FFIError: the model refused.
        """
        request = vaccel.TfliteModelRunRequest(
            session_id=self.remote_id,
            model_id=resource.remote_id,
            in_tensors=[tensor.to_wire(vaccel.TfliteTensor) for tensor in in_tensors],
            nr_out_tensors=nr_out_tensors,
        )
        answer = link.call("TensorflowLiteModelRun", request, vaccel.TfliteModelRunResponse)
        if len(answer.out_tensors) != nr_out_tensors:
            raise FFIError(
                errno.EPROTO, f"the agent answered with {len(answer.out_tensors)} tensors, not {nr_out_tensors}"
            )
        code = 0 if answer.status is None else answer.status.code
        return [Tensor.from_wire(tensor) for tensor in answer.out_tensors], code
