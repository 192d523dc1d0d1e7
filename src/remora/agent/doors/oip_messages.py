"""Messages of `inference.GRPCInferenceService`: the Open Inference Protocol, and what Triton adds to it.

Source: kserve/open-inference-protocol `specification/protocol/open_inference_grpc.proto`, and
triton-inference-server/common `protobuf/grpc_service.proto`.

Tensor contents stay undecoded (`contents` is bytes here): how many elements may be in them depends on the shape, which
is only known once the tensor around them is read.
"""

from __future__ import annotations

from remora.wire.protobuf import (
    Message,
    bool_,
    bytes_,
    double,
    float_,
    int32,
    int64,
    map_,
    message,
    string,
    uint32,
    uint64,
)

SERVICE = "inference.GRPCInferenceService"


class Empty(Message):
    pass


class ServerLiveResponse(Message):
    live: bool = bool_(1)


class ServerReadyResponse(Message):
    ready: bool = bool_(1)


class ModelRequest(Message):
    """ModelReadyRequest and ModelMetadataRequest."""

    name: str = string(1)
    version: str = string(2)


class ModelReadyResponse(Message):
    ready: bool = bool_(1)


class ServerMetadataResponse(Message):
    name: str = string(1)
    version: str = string(2)
    extensions: list[str] = string(3, repeated=True)


class TensorMetadata(Message):
    name: str = string(1)
    datatype: str = string(2)
    shape: list[int] = int64(3, repeated=True)


class ModelMetadataResponse(Message):
    name: str = string(1)
    versions: list[str] = string(2, repeated=True)
    platform: str = string(3)
    inputs: list[TensorMetadata] = message(4, TensorMetadata, repeated=True)
    outputs: list[TensorMetadata] = message(5, TensorMetadata, repeated=True)


class InferParameter(Message):
    bool_param: bool | None = bool_(1, optional=True)
    int64_param: int | None = int64(2, optional=True)
    string_param: str | None = string(3, optional=True)
    double_param: float | None = double(4, optional=True)
    uint64_param: int | None = uint64(5, optional=True)

    @property
    def value(self) -> bool | int | float | str | None:
        for value in (self.bool_param, self.int64_param, self.string_param, self.double_param):
            if value is not None:
                return value
        return self.uint64_param


class InferTensorContents(Message):
    bool_contents: list[bool] = bool_(1, repeated=True)
    int_contents: list[int] = int32(2, repeated=True)
    int64_contents: list[int] = int64(3, repeated=True)
    uint_contents: list[int] = uint32(4, repeated=True)
    uint64_contents: list[int] = uint64(5, repeated=True)
    fp32_contents: list[float] = float_(6, repeated=True)
    fp64_contents: list[float] = double(7, repeated=True)


class InferInputTensor(Message):
    name: str = string(1)
    datatype: str = string(2)
    shape: list[int] = int64(3, repeated=True)
    parameters: dict[str, InferParameter] = map_(4, "string", InferParameter)
    #: An `InferTensorContents`.
    contents: bytes | memoryview = bytes_(5)


class InferRequestedOutput(Message):
    name: str = string(1)
    parameters: dict[str, InferParameter] = map_(2, "string", InferParameter)


class ModelInferRequest(Message):
    model_name: str = string(1)
    model_version: str = string(2)
    id: str = string(3)
    parameters: dict[str, InferParameter] = map_(4, "string", InferParameter)
    inputs: list[InferInputTensor] = message(5, InferInputTensor, repeated=True)
    outputs: list[InferRequestedOutput] = message(6, InferRequestedOutput, repeated=True)
    raw_input_contents: list[bytes | memoryview] = bytes_(7, repeated=True)


class InferOutputTensor(Message):
    name: str = string(1)
    datatype: str = string(2)
    shape: list[int] = int64(3, repeated=True)


class ModelInferResponse(Message):
    model_name: str = string(1)
    model_version: str = string(2)
    id: str = string(3)
    outputs: list[InferOutputTensor] = message(5, InferOutputTensor, repeated=True)
    raw_output_contents: list[bytes | memoryview] = bytes_(6, repeated=True)


class RepositoryIndexRequest(Message):
    repository_name: str = string(1)
    ready: bool = bool_(2)


class ModelIndex(Message):
    name: str = string(1)
    version: str = string(2)
    state: str = string(3)
    reason: str = string(4)


class RepositoryIndexResponse(Message):
    models: list[ModelIndex] = message(1, ModelIndex, repeated=True)


#: Methods of Triton's that are refused by name (stock clients contain them).
NOT_OFFERED = (
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)
