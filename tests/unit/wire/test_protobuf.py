"""The codec's own promises: presence, views, limits, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.wire import protobuf, protobuf_kinds, remora_v1, vaccel
from remora.wire.protobuf import DecodeError, EncodeError, Limits, Message
from remora.wire.protobuf_codec import BIG_BYTES


class Node(Message):
    value: int = protobuf.uint32(1)
    child: Node | None = protobuf.message(2, lambda: Node)
    names: list[str] = protobuf.string(3, repeated=True)
    numbers: list[int] = protobuf.int64(4, repeated=True)
    floats: list[float] = protobuf.double(5, repeated=True)
    table: dict[str, int] = protobuf.map_(6, "string", "uint32")
    owned: bytes = protobuf.bytes_(7)
    view: bytes | memoryview = protobuf.bytes_(8)
    maybe: int | None = protobuf.uint32(9, optional=True)


class Old(Message):
    value: int = protobuf.uint32(1)


class Keeper(Message, keep_unknown=True):
    value: int = protobuf.uint32(1)


def nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = b"\x12" + protobuf_kinds.varint(len(data)) + data
    return data


# -- fields -----------------------------------------------------------------------------------------------------------


def test_absent_fields_read_as_defaults() -> None:
    node = Node.decode(b"")
    assert (node.value, node.child, node.names, node.table, node.owned, node.maybe) == (0, None, [], {}, b"", None)
    assert node == Node()


def test_an_optional_zero_is_sent_and_an_absent_one_is_not() -> None:
    assert Node(maybe=0).to_bytes() == b"\x48\x00"
    assert Node(maybe=None).to_bytes() == b""
    assert Node.decode(b"\x48\x00").maybe == 0


def test_lists_of_different_messages_are_their_own() -> None:
    one, other = Node(), Node()
    one.names.append("x")
    assert other.names == []
    assert one == Node(names=("x",))


def test_wrong_names_are_refused() -> None:
    with pytest.raises(TypeError, match=r"no field valeu; it has value"):
        Node(valeu=1)
    with pytest.raises(AttributeError, match="no field valeu"):
        Node().valeu = 1


def test_declarations_that_cannot_work_are_refused() -> None:
    with pytest.raises(TypeError, match="belongs to Message"):

        class _Clash(Message):
            encode = protobuf.uint32(1)

    with pytest.raises(TypeError, match="twice"):

        class _Twice(Message):
            a = protobuf.uint32(1)
            b = protobuf.uint32(1)

    with pytest.raises(TypeError, match="not within"):
        protobuf.uint32(0)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"value": -1}, "Node.value"),
        ({"value": 1 << 32}, "Node.value"),
        ({"value": 1.5}, "Node.value"),
        ({"value": "1"}, "Node.value"),
        ({"names": "ls"}, "Node.names"),
        ({"names": [b"ls"]}, "Node.names"),
        ({"owned": "text"}, "Node.owned"),
        ({"child": Old()}, "Node.child"),
        ({"numbers": [1 << 63]}, "Node.numbers"),
        ({"names": ["\ud800"]}, "Node.names"),
    ],
)
def test_what_a_field_cannot_carry_is_an_error_that_names_it(values: dict[str, Any], field: str) -> None:
    with pytest.raises(EncodeError, match=field):
        Node(**values).to_bytes()


def test_a_repeated_submessage_is_merged() -> None:
    data = Node(child=Node(value=1, names=["a"])).to_bytes() + Node(child=Node(maybe=2, names=["b"])).to_bytes()
    assert Node.decode(data).child == Node(value=1, maybe=2, names=["a", "b"])


def test_unknown_fields_are_dropped_or_kept_by_class() -> None:
    data = Node(value=5, names=["x"], maybe=3).to_bytes()
    assert Old.decode(data).to_bytes() == b"\x08\x05"
    assert Node.decode(Keeper.decode(data).to_bytes()) == Node.decode(data)


def test_repr_shows_long_bytes_by_their_length() -> None:
    assert repr(Node(value=1, view=bytes(100))) == "Node(value=1, view=<100 bytes>)"


# -- no copies --------------------------------------------------------------------------------------------------------


def test_a_view_field_is_a_slice_of_the_buffer_and_a_bytes_field_is_its_own() -> None:
    buffer = bytearray(Node(owned=b"a" * 10, view=b"b" * 10).to_bytes())
    node = Node.decode(buffer)
    buffer[:] = bytes(len(buffer))
    assert node.owned == b"a" * 10
    assert node.view == bytes(10)


def test_large_bytes_are_encoded_as_the_callers_own_buffer() -> None:
    data = bytearray(BIG_BYTES)
    pieces = remora_v1.InferRequest(model="m", inputs=[remora_v1.Tensor(data=data, name="x")]).encode()
    assert len(pieces) == 2
    data[0] = 9
    assert pieces[1][0] == 9


def test_any_contiguous_buffer_is_bytes() -> None:
    import array

    floats = array.array("f", [1.0, 2.0])
    assert Node.decode(Node(view=memoryview(floats)).to_bytes()).view == floats.tobytes()
    with pytest.raises(EncodeError, match=r"Node\.view"):
        Node(view=memoryview(b"abcd")[::2]).to_bytes()


# -- limits and malformed bytes ---------------------------------------------------------------------------------------


def test_nesting_is_limited() -> None:
    assert Node.decode(nested(32)) is not None
    with pytest.raises(DecodeError, match="max_depth"):
        Node.decode(nested(34))
    with pytest.raises(DecodeError, match="max_depth"):
        Node.decode(b"\x7b" * 5000)  # unknown groups


@pytest.mark.parametrize(
    "data",
    [
        b"\x1a\x00" * 101,
        b"\x22\x65" + b"\x01" * 101,
        b"\x20\x01" * 101,
        b"\x2a\xa8\x06" + bytes(101 * 8),
        b"\x32\x00" * 101,
    ],
    ids=["strings", "packed varints", "unpacked varints", "packed doubles", "map entries"],
)
def test_the_number_of_elements_is_limited(data: bytes) -> None:
    with pytest.raises(DecodeError, match="max_elements"):
        Node.decode(data, limits=Limits(max_elements=100))
    Node.decode(data, limits=Limits(max_elements=101))


def test_the_size_is_limited() -> None:
    with pytest.raises(DecodeError, match="max_bytes"):
        Node.decode(bytes(11), limits=Limits(max_bytes=10))


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\x08\x80",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x12\x05\x08",
        b"\x12\x02\x08\x80\x01",
        b"\x12\x01\x08\x01",
        b"\x1a\x01\xff",
        b"\x00",
        b"\x0e\x00",
        b"\x0c",
        b"\x29\x00\x00",
        b"\x2a\x07" + bytes(7),
        b"\x22\x02\x01\x80",
        b"\x7b\x08\x01",
        b"\x42\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ],
)
def test_malformed_bytes_are_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError, match="Node"):
        Node.decode(data)


CLASSES = [Node, remora_v1.InferRequest, vaccel.GenopRequest, vaccel.ProfilingResponse, vaccel.TfModelRunRequest]
SAMPLE = remora_v1.InferRequest(
    model="m",
    inputs=[remora_v1.Tensor(name="x", dtype="float32", shape=[1, -1, 224], data=bytes(40))],
    outputs=["y"],
    request_id=1 << 40,
).to_bytes()


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(CLASSES), st.binary(max_size=120))
def test_random_bytes_raise_nothing_but_decode_errors(cls: type[Message], data: bytes) -> None:
    try:
        cls.decode(data).to_bytes()
    except DecodeError:
        pass


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_flipped_and_cut_messages_raise_nothing_but_decode_errors(draw: st.DataObject) -> None:
    data = bytearray(SAMPLE)
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    del data[draw.draw(st.integers(0, len(data))) :]
    for cls in CLASSES:
        try:
            cls.decode(data)
        except DecodeError:
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"\x1a\x00" * 200_000,
        b"\x12\x00" * 200_000,
        b"\x22\xc0\x84\x3d" + b"\x01" * 1_000_000,
        b"\x2a\xff\xff\xff\x7f",
        b"\x42\xff\xff\xff\x7f",
        b"\x32\x02\x10\x01" * 100_000,
    ],
    ids=["strings", "messages", "varints", "announced doubles", "announced bytes", "map entries"],
)
def test_no_message_makes_the_decoder_allocate_out_of_proportion(data: bytes) -> None:
    tracemalloc.start()
    try:
        Node.decode(data)
    except DecodeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20


# -- cost -------------------------------------------------------------------------------------------------------------


def test_importing_messages_loads_nothing_heavy() -> None:
    program = (
        "import sys; before = set(sys.modules); import remora.wire.remora_v1, remora.wire.ttrpc.sync, remora.wire.mux;"
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"typing", "dataclasses", "asyncio", "logging", "inspect", "threading", "subprocess", "ctypes", "json"}
    assert not heavy.intersection(loaded)
