"""A REST request for inference, read from a body: JSON, binary tensors behind it, both; and what does not add up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from remora.agent.doors.oip_inputs import InferRequest, read_request
from remora.agent.web.exchange import Exchange
from remora.errors import InvalidArgumentError, RemoraError, UnimplementedError

JSON_TENSOR: dict[str, Any] = {"name": "a", "shape": [2], "datatype": "UINT8", "data": [1, 2]}


def binary(name: str, size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": [size], "datatype": "UINT8", "parameters": {"binary_data_size": size}} | more


def read(document: Any, behind: bytes = b"", *, at: int | str | None = None) -> InferRequest:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    where = len(text) if at is None and behind else at
    headers = {} if where is None else {"inference-header-content-length": str(where)}
    return read_request(Exchange(headers, memoryview(text + behind), None), 1 << 20)


def test_json_and_binary_tensors_may_be_mixed() -> None:
    request = read({"id": "7", "inputs": [binary("x", 3), JSON_TENSOR, binary("y", 2)]}, b"abcde")
    assert [(tensor.name, bytes(tensor.data)) for tensor in request.inputs] == [
        ("x", b"abc"),
        ("a", b"\1\2"),
        ("y", b"de"),
    ]
    assert request.id == "7"
    assert request.outputs == ()


def test_binary_tensors_are_slices_of_the_body() -> None:
    text = json.dumps({"inputs": [binary("x", 4)]}).encode()
    body = bytearray(text + b"abcd")
    headers = {"inference-header-content-length": str(len(text))}
    (tensor,) = read_request(Exchange(headers, memoryview(body), None), 1 << 20).inputs
    body[-4:] = b"wxyz"
    assert bytes(tensor.data) == b"wxyz"


def test_each_output_may_say_how_it_is_wanted() -> None:
    outputs = [{"name": "p", "parameters": {"binary_data": False}}, {"name": "q"}]
    request = read({"inputs": [JSON_TENSOR], "outputs": outputs, "parameters": {"binary_data_output": True}})
    assert request.outputs == ("p", "q")
    assert [request.wants_binary(name) for name in ("p", "q", "r")] == [False, True, True]
    assert read({"inputs": [JSON_TENSOR]}).wants_binary("p") is False


def test_a_timeout_is_in_microseconds() -> None:
    assert read({"inputs": [JSON_TENSOR], "parameters": {"timeout": 2_000_000, "priority": 1}}).timeout_s == 2.0


@pytest.mark.parametrize(
    ("document", "behind", "at"),
    [
        ({"inputs": [binary("x", 3)]}, b"ab", None),
        ({"inputs": [binary("x", 3)]}, b"abcd", None),
        ({"inputs": [binary("x", 3)]}, b"", None),
        ({"inputs": [binary("x", 3, data=[1, 2, 3])]}, b"abc", None),
        ({"inputs": [binary("x", 3, parameters={"binary_data_size": -1})]}, b"abc", None),
        ({"inputs": [binary("x", 3, parameters={"binary_data_size": True})]}, b"abc", None),
        ({"inputs": [binary("x", 3, parameters={"binary_data_size": [3]})]}, b"abc", None),
        ({"inputs": [binary("x", 3, parameters=7)]}, b"abc", None),
        ({"inputs": [JSON_TENSOR]}, b"", 10_000),
        ({"inputs": [JSON_TENSOR]}, b"", "7x"),
        ({"inputs": [JSON_TENSOR]}, b"", 5),
        ({"inputs": [{**JSON_TENSOR, "name": ""}]}, b"", None),
        ({"inputs": [{**JSON_TENSOR, "name": "x" * 1000}]}, b"", None),
        ({"inputs": [{**JSON_TENSOR, "shape": 2}]}, b"", None),
        ({"inputs": [{**JSON_TENSOR, "shape": [True, True]}]}, b"", None),
        ({"inputs": [{**JSON_TENSOR, "shape": [2.0]}]}, b"", None),
        ({"inputs": [{**JSON_TENSOR, "datatype": 5}]}, b"", None),
        ({"inputs": [JSON_TENSOR] * 500}, b"", None),
        ({"inputs": [JSON_TENSOR], "outputs": "all"}, b"", None),
        ({"inputs": [JSON_TENSOR], "outputs": [{"name": 5}]}, b"", None),
        ({"inputs": [JSON_TENSOR], "outputs": [{"name": "p", "parameters": {"binary_data": 1}}]}, b"", None),
        ({"inputs": [JSON_TENSOR], "parameters": {"binary_data_output": "yes"}}, b"", None),
        ({"inputs": [JSON_TENSOR], "parameters": []}, b"", None),
        ({"inputs": [JSON_TENSOR], "id": 7}, b"", None),
        ({"inputs": [JSON_TENSOR], "id": "x" * 5000}, b"", None),
    ],
)
def test_a_body_that_does_not_add_up_is_the_callers_error(document: Any, behind: bytes, at: int | str | None) -> None:
    with pytest.raises(RemoraError) as caught:
        read(document, behind, at=at)
    assert caught.value.http_status < 500


def test_raw_requests_are_refused_by_name() -> None:
    with pytest.raises(UnimplementedError, match="raw requests"):
        read({"inputs": [JSON_TENSOR]}, at=0)


def test_shared_memory_and_classes_are_refused_by_name() -> None:
    shared = {**JSON_TENSOR, "parameters": {"shared_memory_region": "r"}}
    with pytest.raises(UnimplementedError, match="shared memory"):
        read({"inputs": [shared]})
    with pytest.raises(UnimplementedError, match="classes"):
        read({"inputs": [JSON_TENSOR], "outputs": [{"name": "p", "parameters": {"classification": 2}}]})


def test_nothing_is_sent_for_no_input() -> None:
    assert read({"inputs": []}).inputs == ()
    with pytest.raises(InvalidArgumentError):
        read(b"null")
