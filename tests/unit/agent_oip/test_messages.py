"""The gRPC messages, against the stubs that Triton's own client was generated from: same fields, same numbers."""

from __future__ import annotations

from typing import Any

import pytest

from remora.agent.doors import oip_messages as ours
from remora.wire.protobuf import Field, Message

theirs: Any = pytest.importorskip(
    "tritonclient.grpc.service_pb2", reason="tritonclient is missing: pip install tritonclient[all]"
)

PAIRS: dict[type[Message], tuple[str, ...]] = {
    ours.Empty: ("ServerLiveRequest", "ServerReadyRequest", "ServerMetadataRequest"),
    ours.ServerLiveResponse: ("ServerLiveResponse",),
    ours.ServerReadyResponse: ("ServerReadyResponse",),
    ours.ModelRequest: ("ModelReadyRequest", "ModelMetadataRequest"),
    ours.ModelReadyResponse: ("ModelReadyResponse",),
    ours.ServerMetadataResponse: ("ServerMetadataResponse",),
    ours.TensorMetadata: ("ModelMetadataResponse.TensorMetadata",),
    ours.ModelMetadataResponse: ("ModelMetadataResponse",),
    ours.InferParameter: ("InferParameter",),
    ours.InferTensorContents: ("InferTensorContents",),
    ours.InferInputTensor: ("ModelInferRequest.InferInputTensor",),
    ours.InferRequestedOutput: ("ModelInferRequest.InferRequestedOutputTensor",),
    ours.ModelInferRequest: ("ModelInferRequest",),
    ours.InferOutputTensor: ("ModelInferResponse.InferOutputTensor",),
    ours.ModelInferResponse: ("ModelInferResponse",),
    ours.RepositoryIndexRequest: ("RepositoryIndexRequest",),
    ours.ModelIndex: ("RepositoryIndexResponse.ModelIndex",),
    ours.RepositoryIndexResponse: ("RepositoryIndexResponse",),
}


def descriptor(name: str) -> Any:
    found = theirs
    for part in name.split("."):
        found = getattr(found, part)
    return found.DESCRIPTOR


def kind_of(field: Field) -> str:
    if field.map_key:
        return "message"
    return "bytes" if field.name == "contents" else field.kind  # an InferTensorContents, left undecoded


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in PAIRS.items() for name in names])
def test_every_field_has_tritons_name_number_and_type(cls: type[Message], name: str) -> None:
    fields = {field.name: field for field in descriptor(name).fields}
    kinds = {1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 11: "message"}
    kinds |= {12: "bytes", 13: "uint32"}
    for field in cls._fields.values():
        same = fields[field.name]
        wanted = "bytes" if field.name == "contents" else kinds[same.type]
        assert (same.number, wanted) == (field.number, kind_of(field)), field.name
        repeated = same.is_repeated if hasattr(same, "is_repeated") else same.label == 3
        assert repeated == (field.repeated or bool(field.map_key)), field.name


def test_all_messages_are_compared() -> None:
    declared = {cls for cls in vars(ours).values() if isinstance(cls, type) and issubclass(cls, Message)}
    assert declared - {Message} == set(PAIRS)


def test_every_method_of_the_service_is_offered_or_refused_by_name() -> None:
    from remora.agent.doors.oip_grpc import GrpcDoor

    door: Any = GrpcDoor(None, None)  # type: ignore[arg-type]  # only its table is looked at
    methods = set(theirs.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
    assert set(door._methods) | set(ours.NOT_OFFERED) >= methods
    assert not set(door._methods) & set(ours.NOT_OFFERED)


def test_a_request_of_tritons_is_read_and_an_answer_is_read_by_triton() -> None:
    request = theirs.ModelInferRequest(model_name="m", id="7")
    request.parameters["timeout"].int64_param = 5
    request.parameters["name"].string_param = "x"
    given = request.inputs.add(name="input", datatype="FP32", shape=[1, 2])
    given.contents.fp32_contents.extend([1.0, 2.0])
    given.parameters["flag"].bool_param = True
    read = ours.ModelInferRequest.decode(request.SerializeToString())
    assert {name: entry.value for name, entry in read.parameters.items()} == {"timeout": 5, "name": "x"}
    assert read.inputs[0].parameters["flag"].value is True
    assert ours.InferTensorContents.decode(read.inputs[0].contents).fp32_contents == [1.0, 2.0]
    output = ours.InferOutputTensor(name="o", datatype="FP32", shape=[2])
    answer = ours.ModelInferResponse(model_name="m", outputs=[output], raw_output_contents=[b"12345678"])
    got = theirs.ModelInferResponse.FromString(answer.to_bytes())
    assert (got.outputs[0].name, list(got.outputs[0].shape)) == ("o", [2])
    assert got.raw_output_contents == [b"12345678"]
