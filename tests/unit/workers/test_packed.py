"""Inference jobs and answers as packed datagrams, and what a hostile worker may try with them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.backends.contract import Spec
from remora.errors import ProtocolError
from remora.workers.contract import TensorSpec, TensorView
from remora.workers.layout import Layout
from remora.workers.packed import ANSWER, JOB, pack_answer, pack_job, places_of, unpack_answer, unpack_job

WANTED = (TensorSpec("y", "float32", (-1, 4)),)
LAYOUT = Layout([Spec("y", "float32", (2, 4))])


def test_a_job_arrives_as_it_was_sent() -> None:
    inputs = [
        TensorView("a", "uint8", (3,), memoryview(b"123")),
        TensorView("b", "float32", (2, 2), memoryview(bytes(16))),
    ]
    for job_id in (1, 2):  # the second from what is remembered
        data = pack_job(job_id, 7, (3, 4), (128, 640), inputs, [64, 192], ("y",), shared=True)
        assert data[0] == JOB
        job = unpack_job(data)
        assert (job["id"], job["m"], job["a"], job["b"], job["off"], job["len"]) == (job_id, 7, 3, 4, 128, 640)
        assert job["in"] == [("a", "uint8", (3,), 64, 3), ("b", "float32", (2, 2), 192, 16)]
        assert (job["out"], job["shared"]) == (["y"], True)


def test_an_answer_says_where_the_outputs_lie() -> None:
    message = unpack_answer(pack_answer(5, 1000, 3000, 256, LAYOUT))
    assert (message["t"], message["id"], message["us"], message["all"], message["at"]) == ("done", 5, 1000, 3000, 256)
    first = places_of(message, "m", WANTED, 256, 64)
    assert first == (("y", "float32", (2, 4), 0, 32),)
    assert places_of(message, "m", WANTED, 256, 64) is first


@pytest.mark.parametrize(
    ("start", "offset", "size"), [(192, 256, 64), (256 + 64, 256, 64), (256, 256, 31), (1 << 63, 0, 64)]
)
def test_outputs_outside_the_block_are_refused_also_when_their_form_is_known(
    start: int, offset: int, size: int
) -> None:
    places_of(unpack_answer(pack_answer(5, 1, 0, 0, LAYOUT)), "m", WANTED, 0, 64)
    with pytest.raises(ProtocolError):
        places_of(unpack_answer(pack_answer(5, 1, 0, start, LAYOUT)), "m", WANTED, offset, size)


def test_what_one_model_may_answer_another_may_not() -> None:
    message = unpack_answer(pack_answer(5, 1, 0, 0, LAYOUT))
    places_of(message, "m", WANTED, 0, 64)
    for other in ((TensorSpec("y", "float64", (-1,)),), (TensorSpec("z", "float32", (-1,)),), ()):
        with pytest.raises(ProtocolError):
            places_of(message, "m", other, 0, 64)


@pytest.mark.parametrize(
    "layout",
    [
        b"",
        b"[",
        b"{}",
        b'[["y","float32",[2,4],0,33]]',
        b'[["y","float32",[2,4],-64,32]]',
        b'[["y","float32",[-2,-4],0,32]]',
        b'[["y","float32",[1e9,1],0,32]]',
        b'[["y","float32",[2,4],4611686018427387904,32]]',
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout: bytes) -> None:
    with pytest.raises(ProtocolError):
        places_of(unpack_answer(pack_answer(5, 1, 0, 0, LAYOUT)[:33] + layout), "m", WANTED, 0, 64)


@given(st.binary(max_size=80))
def test_no_bytes_do_worse_than_be_refused(data: bytes) -> None:
    try:
        message = unpack_answer(bytes([ANSWER]) + data)
        places_of(message, "m", WANTED, 0, 64)
    except ProtocolError:
        pass


def test_an_impossible_time_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack_answer(struct.pack("<BQQQQ", ANSWER, 1, 1 << 60, 0, 0) + LAYOUT.encoded)
