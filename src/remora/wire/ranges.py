"""Which parts of a piece of memory are free: a first-fit allocator over offsets that never sees the memory itself.

Both ends use it: the agent for a tenant's arena, a client for the region that it shares with the agent. First fit keeps
what is used at the low end, so that pages further up are never touched and cost nothing.
"""

from __future__ import annotations

import bisect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple


class FreeRanges:
    """Hands out ranges of `size_bytes` bytes, each a multiple of `align`."""

    __slots__ = ("size_bytes", "used_bytes", "_align", "_free")

    def __init__(self, size_bytes: int, align: int) -> None:
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._align = align
        self._free: List[Tuple[int, int]] = [(0, size_bytes)]  # (offset, size), by offset, never adjacent

    def _reserved(self, size_bytes: int) -> int:
        return max(self._align, (size_bytes + self._align - 1) // self._align * self._align)

    def take(self, size_bytes: int) -> Optional[int]:
        """Return where `size_bytes` are free, and theirs now; None if no hole is large enough."""
        reserved = self._reserved(size_bytes)
        for index, (offset, hole) in enumerate(self._free):
            if hole >= reserved:
                if hole == reserved:
                    del self._free[index]
                else:
                    self._free[index] = (offset + reserved, hole - reserved)
                self.used_bytes += reserved
                return offset
        return None

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Make a range that was taken free again."""
        reserved = self._reserved(size_bytes)
        self.used_bytes -= reserved
        end = offset + reserved
        index = bisect.bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free[index][1]
            del self._free[index]
        if index and sum(self._free[index - 1]) == offset:
            index -= 1
            offset = self._free[index][0]
            del self._free[index]
        self._free.insert(index, (offset, end - offset))
