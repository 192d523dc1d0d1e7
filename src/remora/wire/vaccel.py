"""Messages and enums of vAccel's AgentService, for unchanged vAccel guests and for clients of vAccel agents.

Names: the proto package goes before the message (`vaccel.genop.Request` is `GenopRequest`), because here one module
holds them all. Source: the .proto files of github.com/nubificus/vaccel-rust (v0.5.0+vaccel.0.8.0), read, not copied.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bytes_, enum, int32, int64, map_, string, uint32, uint64
from remora.wire.protobuf import message as message_
from remora.wire.ttrpc.messages import Any as AnyMessage
from remora.wire.vaccel_enums import ArgType as ArgType
from remora.wire.vaccel_enums import BlobType as BlobType
from remora.wire.vaccel_enums import ErrorType as ErrorType
from remora.wire.vaccel_enums import OpType as OpType
from remora.wire.vaccel_enums import ResourceType as ResourceType
from remora.wire.vaccel_enums import TfDataType as TfDataType
from remora.wire.vaccel_enums import TfliteDataType as TfliteDataType
from remora.wire.vaccel_enums import TorchDataType as TorchDataType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

#: The same methods under the names of the two builds. A client tries the first, then the second on status 3 or 12.
SYNC_SERVICE = "vaccel.sync.agent.AgentService"
ASYNC_SERVICE = "vaccel.asynchronous.agent.AgentService"
SERVICES = (SYNC_SERVICE, ASYNC_SERVICE)

#: Largest message body that vAccel's agent and clients accept; stock ttrpc stops at 4 MiB.
MAX_MESSAGE_BYTES = 1 << 30

#: `details[0].type_url` of an error status. The message in it is `vaccel.Error` nevertheless.
ERROR_TYPE_URL = "type.googleapis.com/vaccel.ProtoError"


# -- vaccel, vaccel.empty, vaccel.session -----------------------------------------------------------------------------


class Empty(Message):
    pass


class Status(Message):
    """`vaccel.Status`; numbers 1 and 2 are not used."""

    code: int = uint32(3)
    message: str = string(4)


class Error(Message):
    """`vaccel.Error`, in `details[0]` of an error status."""

    type: int = enum(1)
    #: Linux errno of the failed operation.
    ffi_error: int | None = uint32(2, optional=True)
    status: Status | None = message_(3, Status)


class SessionCreateRequest(Message):
    #: Plugin types (CPU 1, GPU 2, ...), never REMOTE.
    flags: int = uint32(1)


class SessionCreateResponse(Message):
    session_id: int = int64(1)


class SessionUpdateRequest(Message):
    session_id: int = int64(1)
    flags: int = uint32(2)


class SessionDestroyRequest(Message):
    session_id: int = int64(1)


# -- vaccel.resource --------------------------------------------------------------------------------------------------


class ResourceBlob(Message):
    type_: int = enum(1)
    name: str = string(2)
    data: bytes | memoryview = bytes_(3)
    #: Ignored in favour of len(data).
    size: int = uint32(4)


class ResourceRegisterRequest(Message):
    paths: list[str] = string(1, repeated=True)
    blobs: list[ResourceBlob] = message_(2, ResourceBlob, repeated=True)
    resource_type: int = enum(3)
    #: 0: create from blobs or paths; otherwise register this one with the session.
    resource_id: int = int64(4)
    session_id: int = int64(5)


class ResourceRegisterResponse(Message):
    resource_id: int = int64(1)


class ResourceUnregisterRequest(Message):
    resource_id: int = int64(1)
    session_id: int = int64(2)


class ResourceSyncRequest(Message):
    resource_id: int = int64(1)


class ResourceSyncResponse(Message):
    #: Only `data` and `size` are filled.
    blobs: list[ResourceBlob] = message_(1, ResourceBlob, repeated=True)


# -- vaccel.image, vaccel.genop ---------------------------------------------------------------------------------------


class ImageRequest(Message):
    session_id: int = int64(1)
    image: bytes | memoryview = bytes_(2)


class ImageResponse(Message):
    #: 1024 bytes, padded with NUL: a shorter reply panics vAccel's client.
    tags: bytes = bytes_(1)


class GenopArg(Message):
    buf: bytes | memoryview = bytes_(1)
    size: int = uint32(2)
    arg_type: int = enum(3)
    custom_type_id: int = uint32(4)
    #: Chunks of this argument and number of this one, from 1; 0 and 0 for a whole argument.
    parts: int = uint32(5)
    part_no: int = uint32(6)


class GenopRequest(Message):
    session_id: int = int64(1)
    read_args: list[GenopArg] = message_(2, GenopArg, repeated=True)
    write_args: list[GenopArg] = message_(3, GenopArg, repeated=True)


class GenopResponse(Message):
    write_args: list[GenopArg] = message_(1, GenopArg, repeated=True)


# -- vaccel.torch -----------------------------------------------------------------------------------------------------


class TorchTensor(Message):
    data: bytes | memoryview = bytes_(1)
    dims: list[int] = int64(2, repeated=True)
    type: int = enum(3)


class TorchModelLoadRequest(Message):
    session_id: int = int64(1)
    #: The agent's resource id.
    model_id: int = int64(2)


class TorchModelRunRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)
    run_options: bytes | memoryview | None = bytes_(3, optional=True)
    in_tensors: list[TorchTensor] = message_(4, TorchTensor, repeated=True)
    nr_out_tensors: int = uint64(5)


class TorchModelRunResponse(Message):
    out_tensors: list[TorchTensor] = message_(1, TorchTensor, repeated=True)


# -- vaccel.tf --------------------------------------------------------------------------------------------------------


class TfTensor(Message):
    data: bytes | memoryview = bytes_(1)
    dims: list[int] = int64(2, repeated=True)
    type: int = enum(3)


class TfNode(Message):
    #: Operation and output index.
    name: str = string(1)
    id: int = int32(2)


class TfModelLoadRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)


class TfModelLoadResponse(Message):
    #: Always empty.
    graph_def: bytes = bytes_(1)
    status: Status | None = message_(2, Status)


class TfModelUnloadRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)


class TfModelUnloadResponse(Message):
    status: Status | None = message_(1, Status)


class TfModelRunRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)
    run_options: bytes | memoryview | None = bytes_(3, optional=True)
    #: in_nodes[i] belongs to in_tensors[i].
    in_nodes: list[TfNode] = message_(4, TfNode, repeated=True)
    out_nodes: list[TfNode] = message_(5, TfNode, repeated=True)
    in_tensors: list[TfTensor] = message_(6, TfTensor, repeated=True)


class TfModelRunResponse(Message):
    out_tensors: list[TfTensor] = message_(1, TfTensor, repeated=True)
    status: Status | None = message_(2, Status)


# -- vaccel.tflite ----------------------------------------------------------------------------------------------------


class TfliteTensor(Message):
    data: bytes | memoryview = bytes_(1)
    dims: list[int] = int32(2, repeated=True)
    type: int = enum(3)


class TfliteModelLoadRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)


class TfliteModelUnloadRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)


class TfliteModelRunRequest(Message):
    session_id: int = int64(1)
    model_id: int = int64(2)
    in_tensors: list[TfliteTensor] = message_(3, TfliteTensor, repeated=True)
    nr_out_tensors: int = uint64(4)


class TfliteModelRunResponse(Message):
    out_tensors: list[TfliteTensor] = message_(1, TfliteTensor, repeated=True)
    status: Status | None = message_(2, Status)


# -- vaccel.profiling -------------------------------------------------------------------------------------------------


class ProfilingSample(Message):
    #: Nanoseconds.
    start: int = uint64(1)
    time: int = uint64(2)


class ProfilingRegion(Message):
    samples: list[ProfilingSample] = message_(1, ProfilingSample, repeated=True)


class Profiler(Message):
    component_name: str = string(1)
    regions: dict[str, ProfilingRegion] = map_(2, "string", ProfilingRegion)


class ProfilingRequest(Message):
    session_id: int = int64(1)


class ProfilingResponse(Message):
    profiler: Profiler | None = message_(1, Profiler)


#: Method name -> (request, response). All are unary but GenopStream.
METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "CreateSession": (SessionCreateRequest, SessionCreateResponse),
    "UpdateSession": (SessionUpdateRequest, Empty),
    "DestroySession": (SessionDestroyRequest, Empty),
    "RegisterResource": (ResourceRegisterRequest, ResourceRegisterResponse),
    "UnregisterResource": (ResourceUnregisterRequest, Empty),
    "SyncResource": (ResourceSyncRequest, ResourceSyncResponse),
    "ImageClassification": (ImageRequest, ImageResponse),
    "TensorflowModelLoad": (TfModelLoadRequest, TfModelLoadResponse),
    "TensorflowModelUnload": (TfModelUnloadRequest, TfModelUnloadResponse),
    "TensorflowModelRun": (TfModelRunRequest, TfModelRunResponse),
    "TensorflowLiteModelLoad": (TfliteModelLoadRequest, Empty),
    "TensorflowLiteModelUnload": (TfliteModelUnloadRequest, Empty),
    "TensorflowLiteModelRun": (TfliteModelRunRequest, TfliteModelRunResponse),
    "TorchModelLoad": (TorchModelLoadRequest, Empty),
    "TorchModelRun": (TorchModelRunRequest, TorchModelRunResponse),
    "Genop": (GenopRequest, GenopResponse),
    "GenopStream": (GenopRequest, GenopResponse),
    "GetProfiler": (ProfilingRequest, ProfilingResponse),
}
#: Client-streaming, and only offered by the asynchronous build.
STREAMING = frozenset({"GenopStream"})


def error_details(
    *, ffi_error: Optional[int] = None, error_type: int = ErrorType.FFI, status: Optional[Status] = None
) -> tuple[AnyMessage, ...]:
    """Return the details by which a vAccel client learns an errno; without them its application sees EIO."""
    error = Error(type=error_type, ffi_error=ffi_error, status=status)
    return (AnyMessage(type_url=ERROR_TYPE_URL, value=error.to_bytes()),)
