"""Keeps a shim small: a node has one for each of its pods, and nearly all of them have nothing to do."""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8  # mallopt(3)
_libc = ctypes.CDLL(None)


def share_arena() -> None:
    """Have all threads allocate from one heap. Each short-lived one of a request would leave a heap of its own behind;
    what they would gain, allocating at the same time, Python's lock does not let them do anyway."""
    if hasattr(_libc, "mallopt"):  # not every C library has it
        _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the host what a boot has left behind."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
