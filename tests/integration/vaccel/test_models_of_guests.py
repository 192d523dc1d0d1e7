"""Models through PyTorch's, TensorFlow's and TensorFlow Lite's methods: the file's format chooses what runs it."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import tiny_tflite
from vaccel_google import GoogleClient, RemoteError

DATA, MODEL, BUFFER = 1, 2, 1
FLOAT = {"Torch": 7, "Tensorflow": 1, "TensorflowLite": 1}  # TensorFlow Lite's own number, not its .proto's
VALUE = struct.pack("<f", 4.25)


def register(client: GoogleClient, session: int, *data: bytes, kind: int = MODEL) -> int:
    blobs = [client.message("resource.Blob", type_=BUFFER, name="../m", data=piece, size=len(piece)) for piece in data]
    answer = client.call("RegisterResource", session_id=session, resource_type=kind, blobs=blobs)
    return int(answer.resource_id)


def run(client: GoogleClient, session: int, model: int, service: str, **values: Any) -> Any:
    package = {"Torch": "torch", "Tensorflow": "tf", "TensorflowLite": "tflite"}[service]
    tensor = {"data": VALUE, "dims": [1, 1, 1, 1], "type": FLOAT[service]} | values.pop("tensor", {})
    request: dict[str, Any] = {"session_id": session, "model_id": model}
    request["in_tensors"] = [client.message(f"{package}.Tensor", **tensor)] * values.pop("inputs", 1)
    if service == "Tensorflow":
        request["in_nodes"] = [client.message("tf.Node", name=values.pop("node", "input"), id=0)]
        request["out_nodes"] = [client.message("tf.Node", name="output", id=0)]
    else:
        request["nr_out_tensors"] = 1
    return client.call(f"{service}ModelRun", **request | values)


@pytest.mark.parametrize("service", FLOAT)
def test_an_onnx_model_works_through_every_service(
    client: GoogleClient, session: int, identity: bytes, service: str
) -> None:
    model = register(client, session, identity)
    loaded = client.call(f"{service}ModelLoad", session_id=session, model_id=model)
    answer = run(client, session, model, service)
    (tensor,) = answer.out_tensors
    assert (tensor.data, list(tensor.dims), tensor.type) == (VALUE, [1, 1, 1, 1], FLOAT[service])
    if service != "Torch":
        assert answer.HasField("status")
        assert (answer.status.code, answer.status.message) == (0, "")
        client.call(f"{service}ModelUnload", session_id=session, model_id=model)
        with pytest.raises(RemoteError, match="not loaded") as caught:
            run(client, session, model, service)
        assert (caught.value.code, caught.value.errno) == (13, 22)
    if service == "Tensorflow":
        assert loaded.status.code == 0
        assert loaded.graph_def == b""


@pytest.mark.parametrize("service", FLOAT)
def test_what_a_model_refuses_carries_an_errno_and_for_tensorflow_a_status(
    client: GoogleClient, session: int, identity: bytes, service: str
) -> None:
    model = register(client, session, identity)
    client.call(f"{service}ModelLoad", session_id=session, model_id=model)
    wrong: list[dict[str, Any]] = [
        {"tensor": {"type": 0 if service != "TensorflowLite" else 18}},
        {"tensor": {"dims": []}},
        {"tensor": {"dims": [1, 1, 1, 2]}},
        {"tensor": {"dims": [-1, -1, 1, 1]}},
        {"tensor": {"dims": [1], "data": VALUE}},
        {"inputs": 2},
        {"inputs": 0},
        {"node": "nonsense"} if service == "Tensorflow" else {"nr_out_tensors": 2},
    ]
    for values in wrong:
        with pytest.raises(RemoteError) as caught:
            run(client, session, model, service, **values)
        assert (caught.value.code, caught.value.errno) == (13, 22), values
        in_nodes_only = service == "Tensorflow" and "inputs" in values
        if service != "Torch" and not in_nodes_only:
            assert caught.value.error.type == 1
            assert caught.value.error.status.message


def test_torch_with_no_output_is_an_invalid_argument_of_vaccels(
    client: GoogleClient, session: int, identity: bytes
) -> None:
    model = register(client, session, identity)
    with pytest.raises(RemoteError) as caught:
        run(client, session, model, "Torch", nr_out_tensors=0)
    assert (caught.value.code, caught.value.error.type) == (13, 2)


def test_torchscript_is_a_program_and_so_refused_like_one(client: GoogleClient, session: int) -> None:
    model = register(client, session, b"PK\x03\x04" + bytes(60))
    for method in ("TorchModelLoad", "TensorflowModelLoad", "TensorflowLiteModelLoad"):
        with pytest.raises(RemoteError, match=r"is a program.*exec = false") as caught:
            client.call(method, session_id=session, model_id=model)
        assert (caught.value.code, caught.value.errno) == (7, 13)


@pytest.mark.parametrize("service", FLOAT)
def test_a_tensorflow_lite_model_works_through_every_service(client: GoogleClient, session: int, service: str) -> None:
    model = register(client, session, tiny_tflite.doubling((1, 1, 1, 1)))
    client.call(f"{service}ModelLoad", session_id=session, model_id=model)
    answer = run(client, session, model, service)
    assert bytes(answer.out_tensors[0].data) == struct.pack("<f", 8.5)
    if service != "Torch":
        client.call(f"{service}ModelUnload", session_id=session, model_id=model)


def test_a_damaged_tensorflow_lite_model_is_refused(client: GoogleClient, session: int) -> None:
    model = register(client, session, b"\x1c\0\0\0TFL3" + bytes(60))
    with pytest.raises(RemoteError, match="LiteRT cannot load"):
        client.call("TensorflowLiteModelLoad", session_id=session, model_id=model)


def test_a_model_must_be_a_registered_model_of_one_file(client: GoogleClient, session: int, identity: bytes) -> None:
    data = register(client, session, identity, kind=DATA)
    several = register(client, session, identity, b"more")
    model = register(client, session, identity)
    other = client.call("CreateSession").session_id
    cases = [(session, data, 22), (session, several, 22), (other, model, 1)]
    for number, resource, errno in cases:
        with pytest.raises(RemoteError) as caught:
            client.call("TorchModelLoad", session_id=number, model_id=resource)
        assert caught.value.errno == errno
    with pytest.raises(RemoteError, match="Unknown resource 7") as caught:
        client.call("TorchModelLoad", session_id=session, model_id=7)
    assert (caught.value.code, caught.value.error) == (5, None)
    for number in (0, -1):
        with pytest.raises(RemoteError) as caught:
            client.call("TorchModelLoad", session_id=session, model_id=number)
        assert (caught.value.code, caught.value.error.type) == (13, 2)


def test_a_file_that_is_no_model_is_refused(client: GoogleClient, session: int) -> None:
    model = register(client, session, b"nonsense")
    with pytest.raises(RemoteError, match="not an ONNX model") as caught:
        client.call("TensorflowModelLoad", session_id=session, model_id=model)
    assert (caught.value.code, caught.value.errno, caught.value.error.type) == (13, 22, 1)
