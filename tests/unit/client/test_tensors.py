"""Arrays in and out, with numpy and without, and without copies."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest

from remora.client import tensors
from remora.client.tensors import Tensor, from_wire
from remora.errors import InvalidArgumentError
from remora.wire import remora_v1 as v1


def to_wire(inputs: Any) -> tuple[list[v1.Tensor], bool]:
    read, arrays = tensors.read(inputs)
    return tensors.to_wire(read), arrays


def test_a_tensor_takes_type_and_shape_from_a_typed_buffer() -> None:
    tensor = Tensor(array.array("f", [1.0, 2.0, 3.0]))
    assert (tensor.dtype, tensor.shape, tensor.tolist()) == ("float32", (3,), [1.0, 2.0, 3.0])


def test_bytes_with_a_type_become_one_dimension() -> None:
    assert Tensor(bytes(8), "uint16").shape == (4,)


@pytest.mark.parametrize("dtype", list(v1.DTYPES))
def test_every_element_type_agrees_with_numpy(dtype: str) -> None:
    expected = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = Tensor(expected.tobytes(), dtype, (2, 3))
    assert tensor.tolist() == expected.tolist()
    assert (tensor.numpy() == expected).all()
    assert tensor.numpy().dtype == expected.dtype


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 3), (2, 0, 3), (2, 3, 4), (1, 1)])
def test_nested_lists_have_the_shape(shape: tuple[int, ...]) -> None:
    expected = np.arange(np.prod(shape, dtype=int), dtype="int32").reshape(shape)
    assert Tensor(expected.tobytes(), "int32", shape).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (b"1234", "float32", (2,)),
        (b"1234", "float31", None),
        (b"1234", "uint8", (-4,)),
        (b"1234", "uint8", (2.0, 2)),
        (b"12345", "float32", None),
        ("text", "uint8", None),
        (memoryview(b"123456")[::2], "uint8", (3,)),
    ],
)
def test_a_buffer_that_contradicts_its_type_is_refused(data: Any, dtype: str, shape: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        Tensor(data, dtype, shape)


def test_a_tensor_and_a_contiguous_array_are_sent_from_their_own_memory() -> None:
    source = np.zeros((3, 4), dtype="float32")
    buffer = bytearray(4)
    messages, arrays = to_wire({"a": source, "b": Tensor(buffer, "uint8")})
    assert arrays
    source[0, 0] = 7
    buffer[0] = 9
    assert np.frombuffer(messages[0].data, dtype="float32")[0] == 7
    assert messages[1].data[0] == 9


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(12, dtype="int64").reshape(3, 4).T,
        np.arange(10, dtype="uint8")[::2],
        np.float32(1.5),
        np.array(3, dtype="int16"),
        np.zeros((0, 4), dtype="float64"),
        np.array([True, False]),
    ],
)
def test_any_numpy_array_arrives_equal(value: Any) -> None:
    messages, _ = to_wire({"x": value})
    back = from_wire([v1.Tensor.decode(messages[0].to_bytes())], arrays=True)["x"]
    assert back.shape == value.shape
    assert (back == value).all()


@pytest.mark.parametrize(
    "value", [[1, 2], 1.0, "x", None, object(), np.array(["a"]), np.array([1j]), np.array([object()])]
)
def test_a_value_without_element_type_is_refused_with_what_to_pass(value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        to_wire({"x": value})
    assert caught.value.fix


def test_inputs_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="mapping"):
        to_wire(np.zeros(3))


def test_results_are_tensors_unless_arrays_were_passed() -> None:
    answer = [v1.Tensor(name="y", dtype="float32", shape=[1], data=b"\0\0\x80?")]
    assert from_wire(answer, arrays=False)["y"] == Tensor(b"\0\0\x80?", "float32", (1,))
    assert isinstance(from_wire(answer, arrays=True)["y"], np.ndarray)
    assert to_wire({"x": Tensor(b"1", "uint8")})[1] is False
