"""What a door lets in: names, dtypes, shapes against bytes, counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent import operations
from remora.errors import InvalidArgumentError
from remora.wire.remora_v1 import DTYPES


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4))
def test_a_tensor_whose_bytes_fit_its_shape_is_accepted(dtype: str, shape: list[int]) -> None:
    size = DTYPES[dtype]
    for length in shape:
        size *= length
    tensor = operations.tensor("x", dtype, shape, bytes(size))
    assert tensor.shape == tuple(shape)
    assert len(tensor.data) == size


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(-3, 1 << 62), max_size=20), st.integers(0, 64))
def test_any_other_shape_is_refused_before_anything_is_allocated(dtype: str, shape: list[int], length: int) -> None:
    size = DTYPES[dtype]
    for dimension in shape:
        size *= dimension
    if size == length and len(shape) <= operations.MAX_RANK and all(dimension >= 0 for dimension in shape):
        return
    with pytest.raises(InvalidArgumentError):
        operations.tensor("x", dtype, shape, bytes(length))


def test_an_unknown_dtype_is_told_which_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match=r"bfloat16.*float32"):
        operations.tensor("x", "bfloat16", [1], b"xx")


@pytest.mark.parametrize("name", ["", "a b", "../x", "sha256:xyz", "sha256:" + "A" * 64, "x" * 300, "\0"])
def test_a_name_that_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        operations.check_model(name)


def test_inputs_are_counted_and_named_once() -> None:
    tensor = operations.tensor("x", "uint8", [1], b"1")
    with pytest.raises(InvalidArgumentError, match="no input"):
        operations.infer("m", [], [], deadline_s=None)
    with pytest.raises(InvalidArgumentError, match="same name"):
        operations.infer("m", [tensor, tensor], [], deadline_s=None)
    with pytest.raises(InvalidArgumentError, match="257 input"):
        operations.check_tensor_count(257)
    with pytest.raises(InvalidArgumentError, match="300 outputs"):
        operations.infer("m", [tensor], ["o"] * 300, deadline_s=None)


def test_classify_wants_a_picture_and_a_sensible_number_of_labels() -> None:
    with pytest.raises(InvalidArgumentError, match="no picture"):
        operations.picture("classify", "m", b"", 5, deadline_s=None)
    with pytest.raises(InvalidArgumentError, match="at most 1000"):
        operations.picture("classify", "m", b"x", 1001, deadline_s=None)
    assert operations.picture("classify", "m", b"x", 0, deadline_s=None).top == 5
