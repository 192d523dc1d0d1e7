"""The protocol's values in ours and back: JSON, typed contents, parameters; and the bounds on each."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.doors import oip_values as values
from remora.agent.doors.oip_messages import InferTensorContents
from remora.errors import InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from remora.workers.contract import TensorSpec, TensorView

CODES = {"BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h"}
CODES |= {"INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d"}
_RANGES = {"B": (0, 255), "H": (0, (1 << 16) - 1), "I": (0, (1 << 32) - 1), "Q": (0, (1 << 64) - 1)}
_RANGES |= {"b": (-128, 127), "h": (-(1 << 15), (1 << 15) - 1), "i": (-(1 << 31), (1 << 31) - 1)}
_RANGES |= {"q": (-(1 << 63), (1 << 63) - 1)}


def elements(datatype: str) -> st.SearchStrategy[Any]:
    code = CODES[datatype]
    if code == "?":
        return st.booleans()
    if code in "fd":
        return st.floats(allow_nan=False, allow_infinity=False, width=32 if code == "f" else 64)
    return st.integers(*_RANGES[code])


@pytest.mark.parametrize("datatype", CODES)
@given(data=st.data())
def test_what_json_carries_comes_back(datatype: str, data: st.DataObject) -> None:
    sent = data.draw(st.lists(elements(datatype), max_size=6))
    packed = values.pack("x", datatype, [len(sent)], json.loads(json.dumps(sent)))
    assert packed == struct.pack(f"<{len(sent)}{CODES[datatype]}", *sent)
    view = TensorView("x", values.DTYPES[datatype], (len(sent),), memoryview(packed))
    assert values.unpack(view, 1 << 20) == sent


def test_nested_lists_are_row_major() -> None:
    assert values.pack("x", "UINT8", [2, 2], [[1, 2], [3, 4]]) == bytes([1, 2, 3, 4])
    assert values.pack("x", "UINT8", [2, 2], [1, 2, 3, 4]) == bytes([1, 2, 3, 4])
    assert values.pack("x", "UINT8", [0], []) == b""


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [256]),
        ("UINT8", [-1]),
        ("UINT8", [1.0]),
        ("UINT8", [True]),
        ("INT64", [1 << 63]),
        ("BOOL", [1]),
        ("FP32", [1e39]),
        ("FP32", ["1"]),
        ("FP64", [10**400]),
        ("FP64", [float("inf")]),
        ("FP32", [[1.0], 2.0]),
        ("FP32", [1.0, 2.0]),
        ("FP32", {"0": 1.0}),
        ("FP16", [1.0]),
        ("BF16", [1.0]),
        ("BYTES", ["x"]),
        ("", [1.0]),
    ],
)
def test_what_json_cannot_mean_is_refused(datatype: str, data: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        values.pack("x", datatype, [1], data)


def test_lists_deeper_than_a_tensor_are_refused() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(InvalidArgumentError, match="nested deeper"):
        values.pack("x", "UINT8", [1], deep)


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"{", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 4000])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        values.parse_json(memoryview(text), 1 << 20)


def test_json_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(ResourceExhaustedError, match=r"limits\.json_bytes") as caught:
        values.parse_json(memoryview(b'{"a": 1}'), 7)
    assert caught.value.http_status == 413
    with pytest.raises(InvalidArgumentError, match="lists and objects"):
        values.parse_json(memoryview(b'{"a": [' + b"[]," * 300_000 + b"[]]}"), 1 << 20)


def test_an_answer_that_has_no_json_says_what_to_ask_for() -> None:
    def view(dtype: str, data: bytes, count: int = 1) -> TensorView:
        return TensorView("out", dtype, (count,), memoryview(data))

    for bad in (view("float16", b"\0\0"), view("float32", b"\0\0\xc0\x7f")):
        with pytest.raises(InvalidArgumentError, match="binary_data"):
            values.unpack(bad, 1 << 20)
    with pytest.raises(ResourceExhaustedError, match="binary_data"):
        values.unpack(view("uint8", bytes(100), 100), 399)


FIELDS = {"BOOL": "bool_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents", "INT8": "int_contents"}
FIELDS |= {"INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_contents_are_packed(datatype: str) -> None:
    numbers: list[Any] = [True, False] if datatype == "BOOL" else [1, 2]
    contents = InferTensorContents(**{FIELDS[datatype]: numbers}).to_bytes()
    packed = values.pack_contents("x", datatype, [2], contents, 10)
    assert packed == struct.pack(f"<2{CODES[datatype]}", *numbers)
    with pytest.raises(InvalidArgumentError):
        values.pack_contents("x", datatype, [3], contents, 10)
    with pytest.raises(ResourceExhaustedError, match="raw_input_contents"):
        values.pack_contents("x", datatype, [2], contents, 1)
    wrong = InferTensorContents(fp64_contents=[1.0]) if datatype != "FP64" else InferTensorContents(int_contents=[1])
    with pytest.raises(InvalidArgumentError):
        values.pack_contents("x", datatype, [1], wrong.to_bytes(), 10)


def test_typed_contents_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="range"):
        values.pack_contents("x", "INT8", [1], InferTensorContents(int_contents=[200]).to_bytes(), 10)
    with pytest.raises(InvalidArgumentError, match="no typed contents"):
        values.pack_contents("x", "FP16", [1], b"", 10)


@pytest.mark.parametrize("shape", [[-1], [1 << 40], [1] * 40, [0, 1 << 50]])
def test_shapes_that_no_tensor_has_are_refused(shape: list[int]) -> None:
    with pytest.raises(InvalidArgumentError):
        values.check_shape("x", shape)


def test_metadata_names_types_as_the_protocol_does() -> None:
    specs = [TensorSpec("a", "float16", (-1, 3)), TensorSpec("b", "bool", ())]
    assert values.metadata(specs) == [
        {"name": "a", "datatype": "FP16", "shape": [-1, 3]},
        {"name": "b", "datatype": "BOOL", "shape": []},
    ]
    assert {values.dtype_of("x", one) for one in values.DTYPES} == set(values.DATATYPES)


def test_parameters_mean_what_they_say_or_are_refused() -> None:
    assert values.timeout_of({}) is None
    assert values.timeout_of({"timeout": 0}) is None
    assert values.timeout_of({"timeout": 1_500_000}) == 1.5
    assert values.timeout_of({"timeout": 1 << 80}) == (1 << 53) / 1e6
    for wrong in (-1, "5", 1.5, True):
        with pytest.raises(InvalidArgumentError):
            values.timeout_of({"timeout": wrong})
    for parameters in ({"sequence_id": 5}, {"sequence_start": True}, {"sequence_end": True}):
        with pytest.raises(UnimplementedError):
            values.timeout_of(parameters)
    with pytest.raises(UnimplementedError):
        values.refuse_shared_memory("x", {"shared_memory_region": "r"})
    with pytest.raises(UnimplementedError):
        values.refuse_classification("x", {"classification": 3})
    values.refuse_classification("x", {"classification": 0})


def test_how_long_json_will_be_is_not_underestimated() -> None:
    for dtype, code, value in (
        ("float32", "f", -0.1),
        ("uint8", "B", 255),
        ("int32", "i", -(2**31)),
        ("bool", "?", False),
    ):
        data = struct.pack(f"<100{code}", *[value] * 100)
        view = TensorView("out", dtype, (100,), memoryview(data))
        text = json.dumps(values.unpack(view, 1 << 20))
        assert len(text) - 2 <= values.json_length(view) + 200
