"""The short way of Noop must say what the codec would say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora.agent.doors.native import _same_data
from remora.wire.remora_v1 import NoopRequest, NoopResponse


@given(st.binary(max_size=300), st.integers(0, (1 << 64) - 1))
def test_a_request_comes_back_with_its_data_alone(data: bytes, request_id: int) -> None:
    answer = _same_data(NoopRequest(data=data, request_id=request_id).to_bytes())
    if answer is not None:
        assert NoopResponse.decode(b"".join(answer)) == NoopResponse(data=data)
    else:
        assert not 0 < len(data) < 128


@given(st.one_of(st.binary(max_size=40), st.binary(max_size=12).map(lambda tail: b"\x0a\x02ab" + tail)))
def test_no_bytes_take_the_short_way_that_the_codec_reads_otherwise(payload: bytes) -> None:
    answer = _same_data(payload)
    if answer is not None:
        assert NoopResponse.decode(b"".join(answer)).data == NoopRequest.decode(payload).data
