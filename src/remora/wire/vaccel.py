"""Messages of vAccel's AgentService: the part that the agent answers so far.

Names and numbers are vAccel's (https://github.com/nubificus/vaccel, `protocols/` of its RPC plugin). The same service
exists under two names, one for each of its builds; an agent answers both. Its errors travel as a `vaccel.Error` in the
first detail of a ttrpc status.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bytes_, enum, int64, message, string, uint32

SERVICES = ("vaccel.sync.agent.AgentService", "vaccel.asynchronous.agent.AgentService")
ERROR_TYPE_URL = "type.googleapis.com/vaccel.ProtoError"
#: Bytes of an ImageClassification answer: text, padded with NUL. A shorter one crashes upstream's client.
TAGS_BYTES = 1024

BLOB_FILE, BLOB_BUFFER, BLOB_MAPPED = range(3)
RESOURCE_LIB, RESOURCE_DATA, RESOURCE_MODEL = range(3)
ERROR_FFI, ERROR_FFI_WITH_STATUS, ERROR_INVALID_ARGUMENT = range(3)
ERROR_CONVERSION_FAILED = 6


class Empty(Message):
    pass


class CreateSessionRequest(Message):
    flags: int = uint32(1)


class CreateSessionResponse(Message):
    session_id: int = int64(1)


class UpdateSessionRequest(Message):
    session_id: int = int64(1)
    flags: int = uint32(2)


class DestroySessionRequest(Message):
    session_id: int = int64(1)


class Blob(Message):
    type_: int = enum(1)
    name: str = string(2)
    data: bytes | memoryview = bytes_(3)
    size: int = uint32(4)


class RegisterResourceRequest(Message):
    paths: list[str] = string(1, repeated=True)
    blobs: list[Blob] = message(2, Blob, repeated=True)
    resource_type: int = enum(3)
    #: 0: make a new resource of the blobs; else register this one with the session.
    resource_id: int = int64(4)
    session_id: int = int64(5)


class RegisterResourceResponse(Message):
    resource_id: int = int64(1)


class UnregisterResourceRequest(Message):
    resource_id: int = int64(1)
    session_id: int = int64(2)


class SyncResourceRequest(Message):
    resource_id: int = int64(1)


class SyncResourceResponse(Message):
    #: In the order of registration; only data and size are filled.
    blobs: list[Blob] = message(1, Blob, repeated=True)


class ImageRequest(Message):
    session_id: int = int64(1)
    image: bytes | memoryview = bytes_(2)


class ImageResponse(Message):
    tags: bytes | memoryview = bytes_(1)


class Status(Message):
    code: int = uint32(3)
    message: str = string(4)


class Error(Message):
    type: int = enum(1)
    #: A Linux errno.
    ffi_error: int | None = uint32(2, optional=True)
    status: Status | None = message(3, Status)


#: Methods answered so far -> (request, response). The rest of the service is UNIMPLEMENTED.
METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "CreateSession": (CreateSessionRequest, CreateSessionResponse),
    "UpdateSession": (UpdateSessionRequest, Empty),
    "DestroySession": (DestroySessionRequest, Empty),
    "RegisterResource": (RegisterResourceRequest, RegisterResourceResponse),
    "UnregisterResource": (UnregisterResourceRequest, Empty),
    "SyncResource": (SyncResourceRequest, SyncResourceResponse),
    "ImageClassification": (ImageRequest, ImageResponse),
}
#: Methods of the service that this version does not offer.
OTHER_METHODS = (
    "TensorflowModelLoad",
    "TensorflowModelUnload",
    "TensorflowModelRun",
    "TensorflowLiteModelLoad",
    "TensorflowLiteModelUnload",
    "TensorflowLiteModelRun",
    "TorchModelLoad",
    "TorchModelRun",
    "Genop",
    "GenopStream",
    "GetProfiler",
)
