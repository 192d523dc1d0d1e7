"""TensorFlow's service: tensors belong to nodes, and every answer carries a status."""

from __future__ import annotations

import errno
from enum import IntEnum

from remora.vaccel import link, tensors
from remora.vaccel.errors import FFIError
from remora.wire import vaccel
from remora.wire import vaccel_enums as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, List, Mapping, Optional, Sequence, Tuple

    from remora.vaccel.resource import Resource


class TensorType(IntEnum):
    UNUSED = wire.TfDataType.UNUSED
    FLOAT = wire.TfDataType.FLOAT
    DOUBLE = wire.TfDataType.DOUBLE
    INT32 = wire.TfDataType.INT32
    UINT8 = wire.TfDataType.UINT8
    INT16 = wire.TfDataType.INT16
    INT8 = wire.TfDataType.INT8
    STRING = wire.TfDataType.STRING
    COMPLEX = wire.TfDataType.COMPLEX
    INT64 = wire.TfDataType.INT64
    BOOL = wire.TfDataType.BOOL
    QINT8 = wire.TfDataType.QINT8
    QUINT8 = wire.TfDataType.QUINT8
    QINT32 = wire.TfDataType.QINT32
    BFLOAT16 = wire.TfDataType.BFLOAT16
    QINT16 = wire.TfDataType.QINT16
    QUINT16 = wire.TfDataType.QUINT16
    UINT16 = wire.TfDataType.UINT16
    COMPLEX128 = wire.TfDataType.COMPLEX128
    HALF = wire.TfDataType.HALF
    RESOURCE = wire.TfDataType.RESOURCE
    VARIANT = wire.TfDataType.VARIANT
    UINT32 = wire.TfDataType.UINT32
    UINT64 = wire.TfDataType.UINT64


class Tensor(tensors.Tensor):
    __slots__ = ()
    DTYPES: ClassVar[Mapping[int, str]] = {
        TensorType.FLOAT: "float32",
        TensorType.DOUBLE: "float64",
        TensorType.INT32: "int32",
        TensorType.UINT8: "uint8",
        TensorType.INT16: "int16",
        TensorType.INT8: "int8",
        TensorType.INT64: "int64",
        TensorType.BOOL: "bool",
        TensorType.UINT16: "uint16",
        TensorType.HALF: "float16",
        TensorType.UINT32: "uint32",
        TensorType.UINT64: "uint64",
    }
    TENSOR_TYPE: ClassVar[Any] = TensorType


class Node:
    """An output of an operation in the graph: `name:id` in TensorFlow's words."""

    __slots__ = ("name", "id")

    def __init__(self, name: str, id_: int) -> None:
        self.name = name
        self.id = id_

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {self.id})"


class Status:
    """What TensorFlow says of an operation; code 0 is success."""

    __slots__ = ("code", "message")

    def __init__(self, code: int = 0, message: str = "") -> None:
        self.code = code
        self.message = message

    @classmethod
    def from_wire(cls, status: Optional[vaccel.Status]) -> Status:
        return cls() if status is None else cls(status.code, status.message)

    def __repr__(self) -> str:
        return f"Status({self.code}, {self.message!r})"


class TFMixin:
    """TensorFlow's operations of a `Session`."""

    remote_id: int

    def tf_model_load(self, resource: Resource) -> Status:
        """Load a registered model.

        Raises:
            FFIError: it cannot be loaded; `status` of the error says what the backend said.
        """
        request = vaccel.TfModelLoadRequest(session_id=self.remote_id, model_id=resource.remote_id)
        return Status.from_wire(link.call("TensorflowModelLoad", request, vaccel.TfModelLoadResponse).status)

    def tf_model_unload(self, resource: Resource) -> Status:
        """Undo `tf_model_load`.

        Raises:
            FFIError: it is not loaded.
        """
        request = vaccel.TfModelUnloadRequest(session_id=self.remote_id, model_id=resource.remote_id)
        return Status.from_wire(link.call("TensorflowModelUnload", request, vaccel.TfModelUnloadResponse).status)

    def tf_model_run(
        self,
        resource: Resource,
        in_nodes: Sequence[Node],
        in_tensors: Sequence[Tensor],
        out_nodes: Sequence[Node],
        run_options: Optional[Any] = None,
    ) -> Tuple[List[Tensor], Status]:
        """Run a loaded model; in_nodes[i] belongs to in_tensors[i], and each of out_nodes gives a tensor.

        Raises:
            FFIError: the model refused.
        """
        request = vaccel.TfModelRunRequest(
            session_id=self.remote_id,
            model_id=resource.remote_id,
            run_options=run_options,
            in_nodes=[vaccel.TfNode(name=node.name, id=node.id) for node in in_nodes],
            out_nodes=[vaccel.TfNode(name=node.name, id=node.id) for node in out_nodes],
            in_tensors=[tensor.to_wire(vaccel.TfTensor) for tensor in in_tensors],
        )
        answer = link.call("TensorflowModelRun", request, vaccel.TfModelRunResponse)
        if len(answer.out_tensors) != len(out_nodes):
            raise FFIError(
                errno.EPROTO, f"the agent answered with {len(answer.out_tensors)} tensors, not {len(out_nodes)}"
            )
        return [Tensor.from_wire(tensor) for tensor in answer.out_tensors], Status.from_wire(answer.status)
