"""Memory that this client shares with the agent: its tensors are written there once, and none crosses the socket.

The client hands the memory out, since only it knows when a result is needed no longer: a part goes back when the last
array on it is gone. What the agent may still write to (a call that was given up) never goes back. Loaded only where an
agent offers such memory, because `ctypes` and `mmap` cost a guest time to import.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
import weakref
from collections import deque

from remora.client import transport
from remora.errors import DeadlineExceededError, ProtocolError, UnavailableError
from remora.wire import remora_v1 as v1
from remora.wire.ranges import FreeRanges
from remora.wire.ttrpc.core import request_frame, response_payload
from remora.wire.ttrpc.frames import FrameDecoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

    from remora.client.address import Address

#: What a client asks for at least; pages that are never used cost nothing.
_LEAST_BYTES = 16 << 20
#: A region of which more than this part is lost to calls that were given up is replaced.
_MOST_LOST = 0.5
#: A region has room for this many times the largest tensors seen when it was asked for.
_TIMES = 8


class Region:
    """A mapped region and what of it is free. Safe from several threads."""

    def __init__(self, number: int, fd: int, size_bytes: int) -> None:
        """Map the memory behind `fd`, which is closed."""
        try:
            self._map = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)
        self.number = number
        self.size_bytes = size_bytes
        self.memory = memoryview(self._map)
        self._ranges = FreeRanges(size_bytes, v1.SHARE_ALIGN)
        self._lock = threading.Lock()
        #: Parts whose last array is gone. Filled by the garbage collector, which may come at any time, in any thread,
        #: even in one that holds the lock.
        self._returned: Deque[Tuple[int, int]] = deque()
        self._results: Dict[int, Tuple[int, Any]] = {}  # offset -> size, weak reference to what holds a result
        self._lost_bytes = 0
        self._forked = False
        _regions.add(self)

    @property
    def is_spent(self) -> bool:
        """True if another region should take its place."""
        return self._forked or self._lost_bytes > _MOST_LOST * self.size_bytes

    def take(self, sizes_bytes: List[int]) -> Optional[List[Tuple[int, int]]]:
        """Return (offset, size) of free parts of these sizes; None if they do not all fit."""
        with self._lock:
            while self._returned:
                self._ranges.give_back(*self._returned.popleft())
            taken: List[Tuple[int, int]] = []
            for size_bytes in sizes_bytes:
                offset = self._ranges.take(size_bytes)
                if offset is None:
                    for part in taken:
                        self._ranges.give_back(*part)
                    return None
                taken.append((offset, size_bytes))
            return taken

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Make a part free that nobody uses any more, at either end."""
        self._returned.append((offset, size_bytes))

    def forsake(self, size_bytes: int) -> None:
        """Note that a part never comes back: the agent may still use it."""
        self._lost_bytes += size_bytes

    def result(self, offset: int, size_bytes: int) -> memoryview:
        """Return a view of a part that was taken; the part goes back when the last view of it is gone."""
        # Plain memoryviews of the mapping cannot be told apart; an object between them and it can.
        holder = (ctypes.c_char * size_bytes).from_buffer(self._map, offset)

        def gone(_reference: object) -> None:
            self._results.pop(offset, None)
            self._returned.append((offset, size_bytes))

        self._results[offset] = size_bytes, weakref.ref(holder, gone)
        return memoryview(holder).cast("B")

    def _after_fork_in_parent(self) -> None:
        """Use no part a second time that the child has an array in."""
        if self._results:
            self._forked = True

    def _after_fork_in_child(self) -> None:
        """Give the arrays that came along memory of their own, as all other memory is after a fork."""
        kept = [(offset, bytes(self.memory[offset : offset + size])) for offset, (size, _) in self._results.items()]
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _libc_mmap(start, self.size_bytes, _READ_WRITE, _PRIVATE_HERE, -1, 0)
        for offset, data in kept:
            self.memory[offset : offset + len(data)] = data


_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE_HERE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
_libc_mmap = ctypes.CDLL(None).mmap
_libc_mmap.restype = ctypes.c_void_p
_libc_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
)  # fmt: skip
_regions: weakref.WeakSet[Region] = weakref.WeakSet()


def _for_all(method: str) -> Callable[[], None]:
    def call() -> None:
        for region in list(_regions):
            getattr(region, method)()

    return call


os.register_at_fork(after_in_parent=_for_all("_after_fork_in_parent"), after_in_child=_for_all("_after_fork_in_child"))


def wanted_bytes(tensor_bytes: int, offered_bytes: int) -> int:
    """Return the size of region to ask for."""
    return min(max(_LEAST_BYTES, _TIMES * tensor_bytes), offered_bytes)


def share(address: Address, token: bytes, size_bytes: int, timeout_s: float) -> Region:
    """Ask the agent for a region for the connection of the session with this token.

    It comes on a connection of its own: there no other read can swallow the descriptor.

    Raises:
        RemoraError: the agent refuses, or is gone, or the region cannot be mapped.
    """
    end_s = time.monotonic() + timeout_s
    try:
        with transport.open_socket(address, timeout_s) as sock:
            request = v1.ShareRequest(token=token, size_bytes=size_bytes)
            sock.settimeout(max(0.001, end_s - time.monotonic()))
            sock.sendall(b"".join(request_frame(1, v1.SERVICE, "Share", request, timeout_s=timeout_s)))
            return _receive(sock, end_s)
    except (socket.timeout, TimeoutError) as error:
        raise DeadlineExceededError("the agent did not answer Share in time") from error
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the agent's memory cannot be shared: {error}") from error


def _receive(sock: socket.socket, end_s: float) -> Region:
    decoder = FrameDecoder()
    fds: List[int] = []
    try:
        while True:
            sock.settimeout(max(0.001, end_s - time.monotonic()))
            buffer = decoder.get_buffer()
            data, more, _flags, _address = socket.recv_fds(sock, len(buffer), 1)
            fds += more
            if not data:
                raise UnavailableError("the agent closed the connection")
            buffer[: len(data)] = data
            for _stream, _kind, _flags, body, _block in decoder.received(len(data)):
                if isinstance(body, Exception):
                    raise body
                answer = v1.ShareResponse.decode(response_payload(body))
                if len(fds) != 1 or not answer.region:
                    raise ProtocolError("the agent's answer to Share came without its descriptor")
                return Region(answer.region, fds.pop(), answer.size_bytes)
    finally:
        for fd in fds:
            os.close(fd)
