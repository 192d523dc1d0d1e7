"""Values and buffers of `remora.vaccel`, and how a Genop is cut into messages."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import numpy as np
import pytest

from remora.errors import InternalError, UnavailableError
from remora.vaccel import Arg, ArgType, Config, FFIError, NullPointerError, PluginType
from remora.vaccel.errors import from_remote
from remora.vaccel.genop import messages_of
from remora.vaccel.ops.torch import Tensor, TensorType
from remora.wire import vaccel


@pytest.mark.parametrize(
    ("value", "kind", "data"),
    [
        (7, ArgType.INT64, struct.pack("<q", 7)),
        (7, ArgType.RAW, struct.pack("<i", 7)),
        (1 << 40, ArgType.RAW, struct.pack("<q", 1 << 40)),
        (255, ArgType.UINT8, b"\xff"),
        (True, ArgType.BOOL, b"\x01"),
        (0.5, ArgType.FLOAT32, struct.pack("<f", 0.5)),
        (0.5, ArgType.FLOAT64, struct.pack("<d", 0.5)),
        ("text", ArgType.STRING, b"text\0"),
        ([1, 2], ArgType.INT16_ARRAY, struct.pack("<hh", 1, 2)),
        ([1, 2.5], ArgType.RAW, struct.pack("<ff", 1, 2.5)),
        (b"raw", ArgType.BUFFER, b"raw"),
    ],
)
def test_a_value_becomes_its_bytes_in_c_and_comes_back(value: Any, kind: int, data: bytes) -> None:
    arg = Arg(value, kind)
    sent = arg.to_wire()
    assert (bytes(sent.buf), sent.size, sent.arg_type) == (data, len(data), kind)
    arg.written(memoryview(data))
    assert arg.buf == value
    assert type(arg.buf) is type(value)


def test_buffers_are_sent_from_where_they_lie_and_written_in_place() -> None:
    for value in (bytearray(8), array("i", [0, 0]), np.zeros((1, 2), np.int32)):
        arg = Arg(value)
        arg.written(memoryview(struct.pack("<ii", 3, 4)))
        assert arg.buf is value
        assert bytes(memoryview(value)) == struct.pack("<ii", 3, 4)


def test_what_is_nothing_in_c_is_refused() -> None:
    for value, kind in ((object(), ArgType.RAW), (["a"], ArgType.RAW), (300, ArgType.UINT8), ("x", ArgType.RAW)):
        if isinstance(value, str):
            continue
        with pytest.raises((TypeError, struct.error)):
            Arg(value, kind)
    with pytest.raises(BufferError):
        Arg(np.zeros((4, 4))[:, 1])


def test_an_empty_tensor_has_nothing_to_show() -> None:
    empty = Tensor.empty()
    for read in (lambda: empty.dims, lambda: empty.data, empty.to_bytes, lambda: empty.data_type):
        with pytest.raises(NullPointerError):
            read()
    assert "empty" in repr(empty)


def test_dims_and_data_must_agree() -> None:
    with pytest.raises(ValueError, match="need 16 bytes, got 12"):
        Tensor([2, 2], TensorType.FLOAT, [1, 2, 3])
    with pytest.raises(ValueError, match="unsupported TensorType"):
        Tensor([1], TensorType.UNUSED, [1])
    with pytest.raises(ValueError, match="unsupported numpy dtype float64"):
        Tensor.from_numpy(np.zeros(1))


def joined(messages: list[vaccel.GenopRequest], field: str) -> list[bytes]:
    out: list[bytes] = []
    for message in messages:
        for arg in getattr(message, field):
            if arg.part_no > 1:
                out[-1] += bytes(arg.buf)
            else:
                out.append(bytes(arg.buf))
    return out


@pytest.mark.parametrize("sizes", [(1, 10), (3 << 20, 3 << 20), (9 << 20, 1), (1, 4 << 20, 4 << 20), (1, 4194220)])
def test_messages_of_a_large_genop_stay_below_four_mebibytes(sizes: tuple[int, ...]) -> None:
    args = [vaccel.GenopArg(buf=bytes([n]) * size, size=size) for n, size in enumerate(sizes)]
    messages = list(messages_of(vaccel.GenopRequest(session_id=1 << 62, read_args=args, write_args=args)))
    assert all(message.byte_size() <= 4 << 20 for message in messages)
    assert all(message.session_id == 1 << 62 for message in messages)
    for field in ("read_args", "write_args"):
        assert joined(messages, field) == [bytes(arg.buf) for arg in args]
    last = [bool(message.write_args) for message in messages]
    assert last == sorted(last)  # read arguments first


def test_an_errors_details_decide_the_errno() -> None:
    plain = InternalError("no details")
    assert from_remote(plain).code == 5
    assert from_remote(UnavailableError("gone")).code == 104
    told = InternalError("told")
    told.details = vaccel.error_details(ffi_error=95)
    assert str(from_remote(told)) == "[errno 95] ENOTSUP: told"
    told.details = vaccel.error_details(error_type=6)
    assert from_remote(told).code == 71
    assert issubclass(FFIError, RuntimeError)


def test_the_names_of_the_binding_are_there() -> None:
    config = Config(plugins="a.so", profiling_enabled=True)
    assert (config.plugins, config.log_level, config.log_file, config.profiling_enabled) == ("a.so", 1, None, True)
    with pytest.raises(AttributeError):
        config.plugins = "b.so"  # type: ignore[misc]
    assert PluginType.CPU | PluginType.GPU == 3
    assert int(ArgType.CUSTOM) == 29
