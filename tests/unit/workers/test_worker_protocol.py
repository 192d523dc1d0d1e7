"""Whatever a hostile worker sends is either a checked value or a ProtocolError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.errors import InvalidArgumentError, ProtocolError, ResourceExhaustedError
from remora.workers import protocol
from remora.workers.contract import TensorSpec

SPEC = (TensorSpec("y", "float32", (-1,)),)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=300))
def test_random_datagrams_never_do_more_than_break_the_protocol(data: bytes) -> None:
    try:
        protocol.decode(data)
    except ProtocolError:
        pass


@given(JSON)
def test_random_values_never_do_more_than_break_the_protocol(value: Any) -> None:
    for check in (
        lambda: protocol.specs_of(value),
        lambda: protocol.outputs_of(value, SPEC, 64, 128),
        lambda: protocol.labels_of(value, 10, 3, 0),
        lambda: protocol.error_of(value),
        lambda: protocol.whole(value, "number", 5),
        lambda: protocol.text(value, "text"),
        lambda: protocol.decode(json.dumps(value).encode()),
    ):
        try:
            check()
        except ProtocolError:
            pass


def test_deep_nesting_breaks_the_protocol_and_not_the_agent() -> None:
    with pytest.raises(ProtocolError):
        protocol.decode(b"[" * 60_000)
    with pytest.raises(ProtocolError):
        protocol.decode(b'{"t":' + b"9" * 60_000 + b"}")


def test_an_output_inside_its_block_is_taken() -> None:
    assert protocol.outputs_of([["y", "float32", [8], 96, 32]], SPEC, 64, 128) == (("y", "float32", (8,), 96, 32),)
    assert protocol.outputs_of([["y", "float32", [0], 64, 0]], SPEC, 64, 128) == (("y", "float32", (0,), 64, 0),)


@pytest.mark.parametrize(
    "output",
    [
        ["y", "float32", [8], 0, 32],  # before the block
        ["y", "float32", [8], 180, 32],  # over its end
        ["y", "float32", [8], -64, 32],
        ["y", "float32", [9], 64, 32],  # size and shape differ
        ["y", "float32", [-8], 64, 32],
        ["y", "float32", [2, 2, 2] + [1] * 20, 64, 32],
        ["y", "float64", [4], 64, 32],  # another dtype than the model's
        ["z", "float32", [8], 64, 32],  # not asked for
        ["y", "float32", [8.0], 64, 32],
        ["y", "float32", [True], 64, 4],
        ["y", "float32", [1 << 60, 1 << 60], 64, 32],
        ["y", "float32", [8], 64, 1 << 80],
        ["y", "float32", "8", 64, 32],
        ["y", "float32", [8], 64],
    ],
)
def test_an_output_outside_its_block_or_not_asked_for_is_refused(output: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        protocol.outputs_of([output], SPEC, 64, 128)


@pytest.mark.parametrize("outputs", [[], [["y", "float32", [1], 64, 4]] * 2, None, {}])
def test_the_number_of_outputs_is_what_was_asked(outputs: Any) -> None:
    with pytest.raises(ProtocolError):
        protocol.outputs_of(outputs, SPEC, 64, 128)


@pytest.mark.parametrize(
    "ranking", [[[10, 0.5]], [[-1, 0.5]], [[1, float("nan")]], [[1, "x"]], [[True, 0.5]], [[1, 0.5]] * 4, [1], "x"]
)
def test_an_impossible_ranking_is_refused(ranking: Any) -> None:
    with pytest.raises(ProtocolError):
        protocol.labels_of(ranking, 10, 3, 0)


@pytest.mark.parametrize("place", [[1.0], [1.0, 2.0, 3.0], [1.0, None], [1.0, float("inf")], [1.0, [2.0]]])
def test_a_label_without_its_whole_place_is_refused(place: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        protocol.labels_of([[1, 0.5, *place]], 10, 3, 2)
    assert protocol.labels_of([[1, 0.5, 1, 2.5]], 10, 3, 2) == [(1, 0.5, (1.0, 2.5))]


@pytest.mark.parametrize("dtype", ["", "float31", None, 4])
def test_an_output_of_any_type_still_has_a_type(dtype: Any) -> None:
    anything = [TensorSpec("y", "", ())]
    with pytest.raises(ProtocolError):
        protocol.outputs_of([["y", dtype, [1], 64, 4]], anything, 64, 128)
    assert protocol.outputs_of([["y", "int16", [2], 64, 4]], anything, 64, 128)[0][1] == "int16"


def test_errors_cross_with_their_class_and_fix() -> None:
    error = InvalidArgumentError("bad", fix="good")
    back = protocol.error_of(protocol.error_parts(error))
    assert type(back) is InvalidArgumentError
    assert (back.message, back.fix) == ("bad", "good")
    bare = protocol.error_of(protocol.error_parts(ResourceExhaustedError("x" * 5000)))
    assert len(bare.message) == 1000
    assert bare.fix is None
