"""Arenas: blocks never overlap, are clear when given out, and are found by address."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.errors import ResourceExhaustedError
from remora.workers.arena import ALIGN, Arena, ArenaBlock, address_of


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
@settings(deadline=None)
def test_blocks_never_overlap_and_all_memory_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena("t", 64 * 1024)
    held: list[ArenaBlock] = []
    for take, number in steps:
        if take or not held:
            try:
                block = arena.allocate(number)
            except ResourceExhaustedError:
                continue
            assert block.offset % ALIGN == 0
            assert len(block.view) == number
            assert not any(block.view), "a block is clear when it is given out"
            for other in held:
                assert block.offset + number <= other.offset or other.offset + other.size <= block.offset
            block.view[:] = b"\xff" * number
            held.append(block)
        else:
            held.pop(number % len(held)).release()
    for block in held:
        block.release()
    assert arena.used == 0
    whole = arena.allocate(arena.size)
    assert not any(whole.view)
    arena.close()


def test_large_blocks_go_back_to_the_kernel_and_come_clear() -> None:
    arena = Arena("t", 32 << 20)
    arena.allocate(100)
    block = arena.allocate((9 << 20) + 33)
    block.view[:] = b"\x01" * len(block.view)
    used = os.fstat(arena.fd).st_blocks * 512
    block.release()
    assert os.fstat(arena.fd).st_blocks * 512 <= used - (8 << 20)
    assert not any(arena.allocate((9 << 20) + 33).view)
    arena.close()


def test_a_block_released_twice_is_free_once() -> None:
    arena = Arena("t", 4096)
    block = arena.allocate(100)
    block.release()
    block.release()
    assert arena.used == 0
    arena.close()


def test_a_full_arena_says_how_full_it_is() -> None:
    arena = Arena("t", 8192)
    arena.allocate(8000)
    with pytest.raises(ResourceExhaustedError, match="8000 of 8192") as caught:
        arena.allocate(4096)
    assert "arena_bytes" in (caught.value.fix or "")
    arena.close()


def test_any_slice_is_found_and_nothing_else() -> None:
    arena, other = Arena("t", 8192), Arena("u", 8192)
    block = arena.allocate(1000)
    assert arena.locate(block.view) == block.offset
    assert arena.locate(block.view[10:20]) == block.offset + 10
    assert arena.locate(block.view[10:20].toreadonly()) == block.offset + 10
    assert arena.locate(block.view[5:].cast("B")[5:6]) == block.offset + 10
    assert arena.locate(other.allocate(10).view) is None
    assert arena.locate(memoryview(b"elsewhere")) is None
    arena.close()
    other.close()


def test_the_address_of_read_only_memory_is_known() -> None:
    data = bytes(100)
    assert address_of(memoryview(data)[7:]) == address_of(memoryview(data)) + 7


def test_a_worker_cannot_shrink_or_grow_what_the_agent_maps() -> None:
    arena = Arena("t", 8192)
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    arena.close()


def test_memory_outlives_the_arena_while_somebody_looks_at_it() -> None:
    arena = Arena("t", 8192)
    block = arena.allocate(5)
    block.view[:] = b"hello"
    arena.close()
    assert bytes(block.view) == b"hello"
    block.release()


def test_the_worker_sees_the_same_bytes() -> None:
    arena = Arena("t", 8192)
    block = arena.allocate(5)
    block.view[:] = b"hello"
    with mmap.mmap(arena.fd, arena.size) as theirs:
        assert theirs[block.offset : block.offset + 5] == b"hello"
    arena.close()
