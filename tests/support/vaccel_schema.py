"""vAccel's messages as Google's protobuf makes them, from vAccel's own description and not from our codec.

The table is the protocol's: message, then `name=number type` for each field (`rep`: repeated, `opt`: with presence).
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TABLE = """
vaccel.Status: code=3 uint32, message=4 string
vaccel.Error: type=1 int32, ffi_error=2 opt uint32, status=3 opt vaccel.Status
vaccel.empty.Empty:
vaccel.session.CreateRequest: flags=1 uint32
vaccel.session.CreateResponse: session_id=1 int64
vaccel.session.UpdateRequest: session_id=1 int64, flags=2 uint32
vaccel.session.DestroyRequest: session_id=1 int64
vaccel.resource.Blob: type_=1 int32, name=2 string, data=3 bytes, size=4 uint32
vaccel.resource.RegisterRequest: paths=1 rep string, blobs=2 rep vaccel.resource.Blob, resource_type=3 int32, \
resource_id=4 int64, session_id=5 int64
vaccel.resource.RegisterResponse: resource_id=1 int64
vaccel.resource.UnregisterRequest: resource_id=1 int64, session_id=2 int64
vaccel.resource.SyncRequest: resource_id=1 int64
vaccel.resource.SyncResponse: blobs=1 rep vaccel.resource.Blob
vaccel.image.Request: session_id=1 int64, image=2 bytes
vaccel.image.Response: tags=1 bytes
vaccel.genop.Arg: buf=1 bytes, size=2 uint32, arg_type=3 int32, custom_type_id=4 uint32, \
parts=5 uint32, part_no=6 uint32
vaccel.genop.Request: session_id=1 int64, read_args=2 rep vaccel.genop.Arg, write_args=3 rep vaccel.genop.Arg
vaccel.genop.Response: write_args=1 rep vaccel.genop.Arg
vaccel.torch.Tensor: data=1 bytes, dims=2 rep int64, type=3 int32
vaccel.torch.ModelLoadRequest: session_id=1 int64, model_id=2 int64
vaccel.torch.ModelRunRequest: session_id=1 int64, model_id=2 int64, run_options=3 opt bytes, \
in_tensors=4 rep vaccel.torch.Tensor, nr_out_tensors=5 uint64
vaccel.torch.ModelRunResponse: out_tensors=1 rep vaccel.torch.Tensor
vaccel.tf.Tensor: data=1 bytes, dims=2 rep int64, type=3 int32
vaccel.tf.Node: name=1 string, id=2 int32
vaccel.tf.ModelLoadRequest: session_id=1 int64, model_id=2 int64
vaccel.tf.ModelLoadResponse: graph_def=1 bytes, status=2 opt vaccel.Status
vaccel.tf.ModelUnloadRequest: session_id=1 int64, model_id=2 int64
vaccel.tf.ModelUnloadResponse: status=1 opt vaccel.Status
vaccel.tf.ModelRunRequest: session_id=1 int64, model_id=2 int64, run_options=3 opt bytes, \
in_nodes=4 rep vaccel.tf.Node, out_nodes=5 rep vaccel.tf.Node, in_tensors=6 rep vaccel.tf.Tensor
vaccel.tf.ModelRunResponse: out_tensors=1 rep vaccel.tf.Tensor, status=2 opt vaccel.Status
vaccel.tflite.Tensor: data=1 bytes, dims=2 rep int32, type=3 int32
vaccel.tflite.ModelLoadRequest: session_id=1 int64, model_id=2 int64
vaccel.tflite.ModelUnloadRequest: session_id=1 int64, model_id=2 int64
vaccel.tflite.ModelRunRequest: session_id=1 int64, model_id=2 int64, in_tensors=3 rep vaccel.tflite.Tensor, \
nr_out_tensors=4 uint64
vaccel.tflite.ModelRunResponse: out_tensors=1 rep vaccel.tflite.Tensor, status=2 opt vaccel.Status
vaccel.profiling.Sample: start=1 uint64, time=2 uint64
vaccel.profiling.Region: samples=1 rep vaccel.profiling.Sample
vaccel.profiling.RegionsEntry: key=1 string, value=2 vaccel.profiling.Region
vaccel.profiling.Profiler: component_name=1 string, regions=2 rep vaccel.profiling.RegionsEntry
vaccel.profiling.Request: session_id=1 int64
vaccel.profiling.Response: profiler=1 vaccel.profiling.Profiler
ttrpc.KeyValue: key=1 string, value=2 string
ttrpc.Request: service=1 string, method=2 string, payload=3 bytes, timeout_nano=4 int64, metadata=5 rep ttrpc.KeyValue
ttrpc.Any: type_url=1 string, value=2 bytes
ttrpc.Status: code=1 int32, message=2 string, details=3 rep ttrpc.Any
ttrpc.Response: status=1 ttrpc.Status, payload=2 bytes
"""

#: Method -> (request, response), without the leading `vaccel.`.
METHODS = {
    "CreateSession": ("session.CreateRequest", "session.CreateResponse"),
    "UpdateSession": ("session.UpdateRequest", "empty.Empty"),
    "DestroySession": ("session.DestroyRequest", "empty.Empty"),
    "RegisterResource": ("resource.RegisterRequest", "resource.RegisterResponse"),
    "UnregisterResource": ("resource.UnregisterRequest", "empty.Empty"),
    "SyncResource": ("resource.SyncRequest", "resource.SyncResponse"),
    "ImageClassification": ("image.Request", "image.Response"),
    "TensorflowModelLoad": ("tf.ModelLoadRequest", "tf.ModelLoadResponse"),
    "TensorflowModelUnload": ("tf.ModelUnloadRequest", "tf.ModelUnloadResponse"),
    "TensorflowModelRun": ("tf.ModelRunRequest", "tf.ModelRunResponse"),
    "TensorflowLiteModelLoad": ("tflite.ModelLoadRequest", "empty.Empty"),
    "TensorflowLiteModelUnload": ("tflite.ModelUnloadRequest", "empty.Empty"),
    "TensorflowLiteModelRun": ("tflite.ModelRunRequest", "tflite.ModelRunResponse"),
    "TorchModelLoad": ("torch.ModelLoadRequest", "empty.Empty"),
    "TorchModelRun": ("torch.ModelRunRequest", "torch.ModelRunResponse"),
    "Genop": ("genop.Request", "genop.Response"),
    "GenopStream": ("genop.Request", "genop.Response"),
    "GetProfiler": ("profiling.Request", "profiling.Response"),
}
_LABEL_OPTIONAL, _LABEL_REPEATED = 1, 3


def file_set() -> descriptor_pb2.FileDescriptorSet:
    """Return one file per package, in the order of their dependencies."""
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for line in TABLE.strip().splitlines():
        name, _, fields = line.partition(":")
        package, _, short = name.rpartition(".")
        proto = files.setdefault(
            package, descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        )
        message = proto.message_type.add(name=short)
        for field in filter(None, (part.strip() for part in fields.split(","))):
            _add(proto, message, field)
    return descriptor_pb2.FileDescriptorSet(file=files.values())


def _add(proto: Any, message: Any, text: str) -> None:
    declared, *words = text.split()
    name, _, number = declared.partition("=")
    kind = words[-1]
    field = message.field.add(name=name, number=int(number))
    field.label = _LABEL_REPEATED if "rep" in words else _LABEL_OPTIONAL
    if "." in kind:
        field.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{kind}"
        package = kind.rpartition(".")[0]
        if package != proto.package and f"{package}.proto" not in proto.dependency:
            proto.dependency.append(f"{package}.proto")
        return
    field.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")
    if "opt" in words:
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


class Schema:
    """Google's classes by name."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in file_set().file:
            self._pool.Add(file)

    def of(self, name: str) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))
