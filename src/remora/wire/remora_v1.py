"""Messages of `remora.v1.Accelerator`, the native service of the node agent (docs/protocol.md).

A connection belongs to one session, opened or resumed by `Hello`; later requests carry no session id. That keeps a
guest from naming another session at all, and a request small.
"""

from __future__ import annotations

from remora.wire.protobuf import Message, bool_, bytes_, double, int64, message, string, uint32, uint64

SERVICE = "remora.v1.Accelerator"
#: Version of this protocol; `Hello` is refused with INVALID_ARGUMENT when the client asks for a newer one.
VERSION = 1
#: Upload chunk the SDK uses. An agent accepts any chunk up to its message limit.
CHUNK_BYTES = 1 << 20
#: Where tensors may begin in shared memory: a cache line.
SHARE_ALIGN = 64

#: Element types by name, as numpy spells them, with their size in bytes.
DTYPES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
}


class Empty(Message):
    pass


class HelloRequest(Message):
    version: int = uint32(1)
    #: Name and version of the client, for the agent's log.
    client: str = string(2)
    #: Resume token of an earlier session; empty for a new one.
    token: bytes = bytes_(3)


class HelloResponse(Message):
    #: Public name of the session: for logs, never a credential.
    session_id: str = string(1)
    #: Secret that resumes this session from the same identity.
    token: bytes = bytes_(2)
    #: True if the session of the presented token goes on.
    resumed: bool = bool_(3)
    #: True if this is a copy of the presented session (same models, new id) because the identity is a clone.
    forked: bool = bool_(4)
    #: How long the session outlives its last connection, seconds.
    lease_s: int = uint32(5)
    #: Largest message body the agent accepts from this client, bytes.
    max_message_bytes: int = uint64(6)
    operations: list[str] = string(7, repeated=True)
    agent: str = string(8)
    version: int = uint32(9)
    #: How many bytes of memory the agent would share with this client (`Share`); 0: none.
    share_bytes: int = uint64(10)


class ShareRequest(Message):
    """Asks for shared memory, on a connection of its own: no Hello comes before it."""

    #: Of the session whose connection will use the memory.
    token: bytes = bytes_(1)
    size_bytes: int = uint64(2)


class ShareResponse(Message):
    """Comes with one descriptor (SCM_RIGHTS): a sealed memfd."""

    #: Names the region in requests of that connection.
    region: int = uint32(1)
    size_bytes: int = uint64(2)


class TensorSpec(Message):
    name: str = string(1)
    dtype: str = string(2)
    #: -1 where any size is accepted.
    shape: list[int] = int64(3, repeated=True)


class ModelInfo(Message):
    #: Catalogue name, or `sha256:<hex>` of an uploaded model.
    name: str = string(1)
    #: `classification`, `tensor`, ...
    task: str = string(2)
    inputs: list[TensorSpec] = message(3, TensorSpec, repeated=True)
    outputs: list[TensorSpec] = message(4, TensorSpec, repeated=True)
    digest: str = string(5)
    description: str = string(6)
    licence: str = string(7)
    size_bytes: int = uint64(8)


class ModelsResponse(Message):
    models: list[ModelInfo] = message(1, ModelInfo, repeated=True)


class StatResourceRequest(Message):
    #: `sha256:<64 hex digits>`.
    digest: str = string(1)


class StatResourceResponse(Message):
    #: True if this tenant has the whole resource.
    complete: bool = bool_(1)
    #: Bytes of this tenant's upload that are stored; the next chunk starts here.
    received_bytes: int = uint64(2)


class PutResourceRequest(Message):
    digest: str = string(1)
    offset: int = uint64(2)
    total_bytes: int = uint64(3)
    data: bytes | memoryview = bytes_(4)


class PutResourceResponse(Message):
    received_bytes: int = uint64(1)
    #: True once all bytes are there, match the digest and are on disk: from then on a crash cannot lose them.
    complete: bool = bool_(2)


class LoadModelRequest(Message):
    #: `sha256:<hex>` of a resource of this tenant, or a catalogue name.
    model: str = string(1)
    #: `onnx`; empty to recognise it by its bytes.
    format: str = string(2)


class LoadModelResponse(Message):
    model: ModelInfo | None = message(1, ModelInfo)


class UnloadModelRequest(Message):
    model: str = string(1)


class Tensor(Message):
    name: str = string(1)
    #: A key of `DTYPES`.
    dtype: str = string(2)
    shape: list[int] = int64(3, repeated=True)
    #: Row-major, little-endian, contiguous; its length is the product of the shape times the element size.
    data: bytes | memoryview = bytes_(4)
    #: Where the bytes lie in the message's region instead, a multiple of `SHARE_ALIGN`; their number is as above.
    offset: int = uint64(5)


class Timing(Message):
    """Where the time of a request went inside the agent, microseconds."""

    queue_us: int = uint64(1)
    run_us: int = uint64(2)


class InferRequest(Message):
    model: str = string(1)
    inputs: list[Tensor] = message(2, Tensor, repeated=True)
    #: Names of the outputs wanted; empty for all.
    outputs: list[str] = string(3, repeated=True)
    #: Idempotency key: unique per session, the same when the request is sent again. 0 for none.
    request_id: int = uint64(4)
    #: Shared memory in which all inputs lie; 0: they are in the message.
    region: int = uint32(5)
    #: Part of the region for the outputs; without one, or if it is too small, they come in the answer.
    output_offset: int = uint64(6)
    output_bytes: int = uint64(7)


class InferResponse(Message):
    outputs: list[Tensor] = message(1, Tensor, repeated=True)
    timing: Timing | None = message(2, Timing)
    #: Shared memory in which all outputs lie; 0: they are in the message.
    region: int = uint32(3)


class ClassifyRequest(Message):
    model: str = string(1)
    #: An encoded picture: JPEG, PNG, WebP, GIF or BMP.
    image: bytes | memoryview = bytes_(2)
    #: How many labels, best first; 0 means 5.
    top: int = uint32(3)
    request_id: int = uint64(4)


class Label(Message):
    index: int = uint32(1)
    name: str = string(2)
    #: Probability, 0..1.
    score: float = double(3)


class ClassifyResponse(Message):
    labels: list[Label] = message(1, Label, repeated=True)
    timing: Timing | None = message(2, Timing)


class PictureRequest(Message):
    """Of `Detect`, `Segment`, `Pose` and `Depth`; the fields are those of ClassifyRequest."""

    #: Empty for the catalogue's first model for the operation.
    model: str = string(1)
    image: bytes | memoryview = bytes_(2)
    #: How many objects or points; 0 for all.
    top: int = uint32(3)
    request_id: int = uint64(4)


class Detection(Message):
    """An object, with the corners of its box in pixels of the upright picture."""

    index: int = uint32(1)
    name: str = string(2)
    score: float = double(3)
    x1: float = double(4)
    y1: float = double(5)
    x2: float = double(6)
    y2: float = double(7)


class DetectResponse(Message):
    #: Best first.
    objects: list[Detection] = message(1, Detection, repeated=True)
    timing: Timing | None = message(2, Timing)


class Keypoint(Message):
    """A point of a body, in pixels of the upright picture."""

    index: int = uint32(1)
    name: str = string(2)
    score: float = double(3)
    x: float = double(4)
    y: float = double(5)


class PoseResponse(Message):
    #: In the model's order.
    keypoints: list[Keypoint] = message(1, Keypoint, repeated=True)
    timing: Timing | None = message(2, Timing)


class MapResponse(Message):
    """Of `Segment` (uint8: the number of a label) and `Depth` (float32): [height, width] over the whole picture."""

    map: Tensor | None = message(1, Tensor)
    #: What the numbers of `Segment` mean.
    labels: list[str] = string(2, repeated=True)
    timing: Timing | None = message(3, Timing)


class NoopRequest(Message):
    """Costs a request without an operation: for `ping` and for measuring. `data` comes back unchanged."""

    data: bytes | memoryview = bytes_(1)
    request_id: int = uint64(2)


class NoopResponse(Message):
    data: bytes | memoryview = bytes_(1)


#: Method name -> (request, response). All are unary.
METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "Hello": (HelloRequest, HelloResponse),
    "Share": (ShareRequest, ShareResponse),
    "Close": (Empty, Empty),
    "Noop": (NoopRequest, NoopResponse),
    "Models": (Empty, ModelsResponse),
    "StatResource": (StatResourceRequest, StatResourceResponse),
    "PutResource": (PutResourceRequest, PutResourceResponse),
    "LoadModel": (LoadModelRequest, LoadModelResponse),
    "UnloadModel": (UnloadModelRequest, Empty),
    "Infer": (InferRequest, InferResponse),
    "Classify": (ClassifyRequest, ClassifyResponse),
    "Detect": (PictureRequest, DetectResponse),
    "Segment": (PictureRequest, MapResponse),
    "Pose": (PictureRequest, PoseResponse),
    "Depth": (PictureRequest, MapResponse),
}
