"""Shared memory for tensors on their way: a message is received into it and the worker reads it where it lies.

One arena per tenant, a sealed memfd that the agent and the tenant's workers map; no arena ever belongs to two tenants.
The seals matter: a hostile worker that could shrink the file would end the agent by SIGBUS. Free memory is zero (a
block is cleared when it is given back), so no message finds another's bytes. A region is shared with a client as well
(docs/decisions/0009-shared-memory-for-local-clients.md).

A memoryview anywhere inside an arena is found by its address, so callers pass slices of what they received and need to
know nothing of offsets.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from itertools import count

from remora.errors import ResourceExhaustedError
from remora.wire.ranges import FreeRanges

#: Cache line, and enough for any vector instruction.
ALIGN = 64
#: From here on a block's pages go back to the kernel when it is released; below, clearing is cheaper.
_PUNCH_BYTES = 4 << 20
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_F_ADD_SEALS = 1033
_PYBUF_SIMPLE = 0


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer: the only way to a read-only memoryview's address without numpy."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def address_of(view: memoryview) -> int:
    """Return where a contiguous memoryview's bytes lie."""
    buffer = _PyBuffer()
    _get_buffer(view, ctypes.byref(buffer), _PYBUF_SIMPLE)
    try:
        return int(buffer.buf or 0)
    finally:
        _release_buffer(ctypes.byref(buffer))


class SharedMemory:
    """A sealed memfd of fixed size, mapped here; a worker or a client maps it by its descriptor."""

    _ids = count(1)

    def __init__(self, name: str, size_bytes: int) -> None:
        self.id = next(self._ids)
        self.size = (size_bytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        self.fd = os.memfd_create(f"remora-{name}-{self.id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, self.size)
        except OSError:
            os.close(self.fd)
            raise
        self.memory = memoryview(self._map)
        self._base = address_of(self.memory)

    def locate(self, view: memoryview) -> int | None:
        """Return the offset of a memoryview that lies in this memory, else None."""
        if view.obj is not self._map:
            return None
        return address_of(view) - self._base

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def close(self) -> None:
        """Close the descriptor. The memory goes when the last view of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def aligned(size_bytes: int) -> int:
    """Return the room that a worker needs for an output, which it places at a multiple of `ALIGN`."""
    return (size_bytes + ALIGN - 1) // ALIGN * ALIGN


class ArenaBlock:
    """Part of an arena; give it back once."""

    __slots__ = ("arena", "offset", "size", "view", "_held")

    def __init__(self, arena: Arena, offset: int, size: int) -> None:
        self.arena = arena
        self.offset = offset
        self.size = size
        self._held = True
        self.view = arena.memory[offset : offset + size]

    def release(self) -> None:
        """Clear the block and make it free; harmless when done twice."""
        if self._held:
            self._held = False
            self.arena._give_back(self.offset, self.size)


class Arena(SharedMemory):
    """A tenant's shared memory, which the agent hands out."""

    def __init__(self, tenant: str, size_bytes: int) -> None:
        super().__init__("arena", size_bytes)
        self.tenant = tenant
        self._ranges = FreeRanges(self.size, ALIGN)

    @property
    def used(self) -> int:
        return self._ranges.used_bytes

    def allocate(self, size_bytes: int) -> ArenaBlock:
        """Return a zeroed block.

        Raises:
            ResourceExhaustedError: no hole is large enough.
        """
        offset = self._ranges.take(size_bytes)
        if offset is None:
            raise ResourceExhaustedError(
                f"{size_bytes} bytes do not fit into the tenant's arena: {self.used} of {self.size} bytes are in use",
                fix="send less at once, or raise arena_bytes in the agent's configuration",
            )
        return ArenaBlock(self, offset, size_bytes)

    def _give_back(self, offset: int, size: int) -> None:
        self._clear(offset, size)
        self._ranges.give_back(offset, size)

    def _clear(self, offset: int, size: int) -> None:
        if size >= _PUNCH_BYTES:
            page = mmap.PAGESIZE
            start, end = -(-offset // page) * page, (offset + size) // page * page
            self._map.madvise(mmap.MADV_REMOVE, start, end - start)
            ctypes.memset(self._base + offset, 0, start - offset)
            ctypes.memset(self._base + end, 0, offset + size - end)
        else:
            ctypes.memset(self._base + offset, 0, size)


class Region(SharedMemory):
    """Memory that the agent shares with one client, which hands out its parts as it likes.

    The client writes to it whenever it likes, too: what is read here may be another value the next time. Workers copy
    what they compute on (`backends.contract.Exposure` says where they need not).
    """

    def __init__(self, tenant: str, size_bytes: int) -> None:
        try:
            super().__init__("region", size_bytes)
        except OSError as error:
            raise ResourceExhaustedError(
                f"the agent cannot share {size_bytes} bytes: {error.strerror}", fix="send tensors in messages"
            ) from error
        self.tenant = tenant


class RegionBlock:
    """Where a client wants a job's outputs: a part of its region, which the agent only checks."""

    __slots__ = ("arena", "offset", "size")

    def __init__(self, region: Region, offset: int, size: int) -> None:
        self.arena = region
        self.offset = offset
        self.size = size

    def release(self) -> None:
        """Do nothing: the client knows when it needs the part no longer."""
