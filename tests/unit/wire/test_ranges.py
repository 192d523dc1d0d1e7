"""The allocator of shared memory: no two parts overlap, and what is given back can be had again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora.wire.ranges import FreeRanges

SIZE = 4096
STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 700), st.integers(0, 1000)), max_size=60)


def test_all_of_it_can_be_had_at_once() -> None:
    ranges = FreeRanges(SIZE, 64)
    assert ranges.take(SIZE) == 0
    assert ranges.take(1) is None
    ranges.give_back(0, SIZE)
    assert ranges.take(SIZE) == 0


@given(STEPS)
def test_parts_never_overlap_and_come_back_whole(steps: list[tuple[bool, int, int]]) -> None:
    ranges = FreeRanges(SIZE, 64)
    held: list[tuple[int, int]] = []
    for takes, size, pick in steps:
        if takes or not held:
            offset = ranges.take(size)
            if offset is None:
                continue
            assert offset % 64 == 0
            assert offset + size <= SIZE
            assert all(offset >= start + max(length, 1) or offset + max(size, 1) <= start for start, length in held)
            held.append((offset, size))
        else:
            ranges.give_back(*held.pop(pick % len(held)))
    for part in held:
        ranges.give_back(*part)
    assert ranges.used_bytes == 0
    assert ranges.take(SIZE) == 0
