"""Bytes that vAccel's own client and agent exchange: ours are the same, to the byte."""

from __future__ import annotations

import pytest

from remora.errors import InternalError, NotFoundError
from remora.wire import vaccel
from remora.wire.ttrpc import core
from remora.wire.ttrpc.frames import FrameDecoder

CREATE_SESSION = (
    bytes.fromhex("00 00 00 33 00 00 00 01 01 00 0a 1e")
    + b"vaccel.sync.agent.AgentService"
    + bytes.fromhex("12 0d")
    + b"CreateSession"
    + bytes.fromhex("1a 02 08 02")
)
SESSION_REPLY = bytes.fromhex("00 00 00 06 00 00 00 01 02 00 0a 00 12 02 08 01")
NOT_FOUND = bytes.fromhex("00 00 00 17 00 00 00 03 02 00 0a 15 08 05 12 11") + b"Unknown session 7"
ERRNO_95 = (
    bytes.fromhex("00 00 00 40 00 00 00 05 02 00 0a 3e 08 0d 12 0d")
    + b"FFI error: 95"
    + bytes.fromhex("1a 2b 0a 25")
    + b"type.googleapis.com/vaccel.ProtoError"
    + bytes.fromhex("12 02 10 5f")
)
GENOP = bytes.fromhex(
    "08 01 12 07 0a 01 03 10 01 18 09 12 08 0a 02 ff d8 10 02 18 1c"
    "1a 0a 0a 04 00 00 00 00 10 04 18 1a 1a 0a 0a 04 00 00 00 00 10 04 18 1a"
)


def joined(pieces: list[bytes | memoryview]) -> bytes:
    return b"".join(pieces)


def received(data: bytes) -> bytes | memoryview:
    decoder = FrameDecoder()
    decoder.get_buffer()[: len(data)] = data
    ((_stream, _kind, _flags, body, _block),) = decoder.received(len(data))
    assert isinstance(body, (bytes, memoryview))
    return body


def test_create_session() -> None:
    request = vaccel.SessionCreateRequest(flags=2)
    assert joined(core.request_frame(1, vaccel.SYNC_SERVICE, "CreateSession", request)) == CREATE_SESSION
    assert len(CREATE_SESSION) == 61


def test_the_reply_to_create_session() -> None:
    assert joined(core.response_frame(1, vaccel.SessionCreateResponse(session_id=1))) == SESSION_REPLY
    payload = core.response_payload(received(SESSION_REPLY))
    assert vaccel.SessionCreateResponse.decode(payload).session_id == 1


def test_an_unknown_session() -> None:
    assert joined(core.error_frame(3, NotFoundError("Unknown session 7"))) == NOT_FOUND
    with pytest.raises(NotFoundError, match="Unknown session 7"):
        core.response_payload(received(NOT_FOUND))


def test_an_errno() -> None:
    error = InternalError("FFI error: 95")
    assert joined(core.error_frame(5, error, vaccel.error_details(ffi_error=95))) == ERRNO_95
    with pytest.raises(InternalError) as caught:
        core.response_payload(received(ERRNO_95))
    (detail,) = caught.value.details
    assert detail.type_url == vaccel.ERROR_TYPE_URL
    assert vaccel.Error.decode(detail.value).ffi_error == 95


def test_genop() -> None:
    args, types = vaccel.GenopArg, vaccel.ArgType
    request = vaccel.GenopRequest(
        session_id=1,
        read_args=[
            args(buf=b"\x03", size=1, arg_type=types.UINT8),
            args(buf=b"\xff\xd8", size=2, arg_type=types.BUFFER),
        ],
        write_args=[args(buf=bytes(4), size=4, arg_type=types.UCHAR_ARRAY) for _ in range(2)],
    )
    assert request.to_bytes() == GENOP
    assert len(GENOP) == 45
    assert vaccel.GenopRequest.decode(GENOP) == request


def test_enums_have_the_published_numbers() -> None:
    assert (vaccel.ArgType.CUSTOM, vaccel.ArgType.UCHAR_ARRAY, vaccel.ArgType.STRING) == (29, 26, 27)
    assert (vaccel.TorchDataType.FLOAT, vaccel.TfDataType.UINT64, vaccel.TfDataType.HALF) == (7, 23, 19)
    assert (vaccel.TfliteDataType.FLOAT32, vaccel.TfliteDataType.INT4) == (1, 18)
    assert (vaccel.ErrorType.CONVERSION_FAILED, vaccel.ResourceType.MODEL, vaccel.BlobType.MAPPED) == (6, 2, 2)


def test_every_method_is_declared() -> None:
    assert len(vaccel.METHODS) == 18
    assert vaccel.METHODS.keys() >= vaccel.STREAMING
