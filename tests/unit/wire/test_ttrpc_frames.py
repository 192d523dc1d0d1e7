"""The frame decoder: any pieces, no copies of large bodies, nothing kept of what is too large."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.errors import ProtocolError, RemoraError, ResourceExhaustedError
from remora.wire.ttrpc.frames import ALLOCATE_BYTES, HEADER, FrameDecoder, HeapBlock, MessageTooLargeError

LIMIT = 200_000


def frame(stream: int, body: bytes, kind: int = 1, flags: int = 0) -> bytes:
    return HEADER.pack(len(body), stream, kind, flags) + body


def feed(decoder: FrameDecoder, data: bytes, sizes: list[int]) -> list[Any]:
    """Pass `data` as reads of the given sizes (the last one repeats), each no larger than the buffer allows."""
    frames: list[Any] = []
    pos, turn = 0, 0
    while pos < len(data):
        buffer = decoder.get_buffer()
        assert len(buffer) > 0
        count = min(sizes[min(turn, len(sizes) - 1)], len(buffer), len(data) - pos)
        buffer[:count] = data[pos : pos + count]
        frames.extend(decoder.received(count))
        pos += count
        turn += 1
    return frames


def summary(frame: Any) -> tuple[int, int, int, bytes | type[RemoraError]]:
    stream, kind, flags, body, _block = frame
    return stream, kind, flags, type(body) if isinstance(body, RemoraError) else bytes(body)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 50, 8181, 8182, 8183, 20_000, 70_000, LIMIT, LIMIT + 1, 300_000]), max_size=5),
    st.lists(st.sampled_from([1, 3, 9, 10, 11, 500, 8192, 100_000]), min_size=1, max_size=5),
)
def test_frames_in_any_pieces_come_out_whole_and_large_ones_as_refusals(bodies: list[int], reads: list[int]) -> None:
    if sum(bodies) > 400_000 and reads[-1] < 500:
        reads = [*reads, 500]
    data = b"".join(frame(2 * i + 1, bytes([i + 1]) * size, flags=i) for i, size in enumerate(bodies))
    got = [summary(each) for each in feed(FrameDecoder(LIMIT), data, reads)]
    assert got == [
        (2 * i + 1, 1, i, MessageTooLargeError if size > LIMIT else bytes([i + 1]) * size)
        for i, size in enumerate(bodies)
    ]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=6))
def test_random_bytes_raise_nothing_but_protocol_errors(chunks: list[bytes]) -> None:
    decoder = FrameDecoder(LIMIT)
    try:
        for chunk in chunks:
            feed(decoder, chunk, [len(chunk)])
    except ProtocolError:
        pass
    decoder.close()


def test_a_large_body_is_received_into_the_block_that_was_allocated_for_it() -> None:
    blocks: list[HeapBlock] = []

    def allocate(size: int) -> HeapBlock:
        blocks.append(HeapBlock(size))
        return blocks[-1]

    decoder = FrameDecoder(1 << 20, allocate=allocate)
    body = bytes(range(256)) * 400
    assert len(body) > ALLOCATE_BYTES
    ((_stream, _kind, _flags, view, block),) = feed(decoder, frame(1, body), [8192, 60_000])
    assert block is blocks[0]
    assert bytes(view) == body
    blocks[0].view[0] = 255
    assert view[0] == 255


def test_when_no_block_is_to_be_had_the_body_is_skipped_and_the_reason_told() -> None:
    def allocate(_size: int) -> HeapBlock:
        raise ResourceExhaustedError("the tenant's arena is full")

    frames = feed(FrameDecoder(1 << 20, allocate=allocate), frame(1, bytes(100_000)) + frame(3, b"next"), [8192])
    assert [summary(each) for each in frames] == [(1, 1, 0, ResourceExhaustedError), (3, 1, 0, b"next")]


def test_the_block_of_a_frame_that_never_ends_is_given_back() -> None:
    released = []

    class Counted(HeapBlock):
        def release(self) -> None:
            released.append(True)

    decoder = FrameDecoder(1 << 20, allocate=Counted)
    assert feed(decoder, frame(1, bytes(100_000))[:5000], [5000]) == []
    assert decoder.partial_bytes == 100_000
    decoder.close()
    assert released == [True]


def test_memory_of_a_body_is_used_again_only_when_nobody_looks_at_it() -> None:
    first = HeapBlock(500_000)
    first.view[:5] = b"first"
    held = first.view[:5]
    del first
    second = HeapBlock(500_000)
    second.view[:5] = b"other"
    assert bytes(held) == b"first"


def test_a_frame_of_an_unknown_type_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="does not speak ttrpc"):
        feed(FrameDecoder(), frame(1, b"", kind=4), [10])
