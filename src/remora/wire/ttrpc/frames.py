"""ttrpc frames without I/O: ten bytes of header, then the body (docs/protocol-wire.md).

The decoder says where the next bytes should go (`get_buffer`), so that a large body is received straight into the block
it will stay in, be that shared memory that a worker maps. Small frames share one scratch buffer per reactor and are
copied out of it, so that an idle connection owns no buffer at all. A body beyond the limit is skipped, never stored.
"""

from __future__ import annotations

import mmap
import struct

from remora.errors import ProtocolError, RemoraError, ResourceExhaustedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Optional, Protocol, Tuple, Union

    class Block(Protocol):
        """Memory for one message body."""

        @property
        def view(self) -> memoryview: ...

        def release(self) -> None: ...

    Allocate = Callable[[int], Block]
    #: Stream id, type, flags, body, block of the body. Instead of a body that was not accepted: the reason.
    Frame = Tuple[int, int, int, Union[bytes, memoryview, RemoraError], Optional[Block]]

#: Length of the body, stream id, type, flags; big-endian.
HEADER = struct.Struct(">IIBB")
REQUEST, RESPONSE, DATA = 1, 2, 3
#: The sender will send no more on this stream; it will send more; this frame carries no message.
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4

#: What containerd's implementations accept, and our default.
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
#: First read of a frame: the part of a large body that comes with it is the only part ever copied.
SCRATCH_BYTES = 8192
#: Bodies from here on get their block from `allocate`.
ALLOCATE_BYTES = 65536

#: Mappings kept for the next large body: how many, and up to which size.
_KEEP_MAPPINGS, _KEEP_BYTES = 4, 1 << 20

#: A begun frame may take a server's `frame_timeout_s` and this long for its bytes.
_SLOWEST_BYTES_PER_S = 65536

_HEADER_BYTES = HEADER.size
_kept_mappings: List[mmap.mmap] = []


class HeapBlock:
    """A body in this process's own memory, which goes with its last view.

    A large one is an anonymous mapping: its pages cost nothing until bytes arrive, so a peer that announces 4 MiB and
    sends nothing holds nothing. The last few mappings are used again, for fresh pages cost more than the bytes that are
    received into them (588 KiB: 0.25 ms against 0.05 ms).
    """

    __slots__ = ("view",)

    def __init__(self, size: int) -> None:
        self.view = (_mapping(size) if size >= ALLOCATE_BYTES else memoryview(bytearray(size)))[:size]

    def release(self) -> None:
        """Do nothing: the memory goes with its last view."""


def _mapping(size: int) -> memoryview:
    for _ in range(len(_kept_mappings)):
        try:
            kept = _kept_mappings.pop(0)  # out of the list while it is looked at: no other thread may take it
        except IndexError:
            break
        if size <= len(kept) <= 2 * size and _is_free(kept):
            view = memoryview(kept)
            _kept_mappings.append(kept)
            return view
        _kept_mappings.append(kept)
    # Private: a shared mapping would be one memory for this process and its forks.
    made = mmap.mmap(-1, size + -size % ALLOCATE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(made)
    if size <= _KEEP_BYTES:
        _kept_mappings.append(made)
        del _kept_mappings[:-_KEEP_MAPPINGS]
    return view


def _is_free(mapping: mmap.mmap) -> bool:
    """True if nobody holds a view of `mapping`: only then does it let itself be resized, if only to its own size."""
    try:
        mapping.resize(len(mapping))
    except BufferError:
        return False
    return True


class MessageTooLargeError(ResourceExhaustedError):
    """A message is larger than its receiver accepts."""


class FrameDecoder:
    """Turns received bytes into frames. Call `get_buffer`, receive into it, then `received` with the count.

    Args:
        max_message_bytes: Largest body; a larger one becomes a frame whose body is a ResourceExhaustedError.
        limit_name: What says so, for that error.
        scratch: Buffer for frame starts and small frames; may be shared with others between the two calls.
        allocate: Makes blocks for bodies of `ALLOCATE_BYTES` and more that do not arrive in one piece with their
            header; may raise a RemoraError, which then stands in for the body.
    """

    __slots__ = (
        "max_message_bytes",
        "limit_name",
        "frames",
        "_scratch",
        "_allocate",
        "_head",
        "_begun",
        "_block",
        "_view",
        "_filled",
        "_skip",
    )

    def __init__(
        self,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        *,
        scratch: Optional[memoryview] = None,
        allocate: Optional[Allocate] = None,
        limit_name: str = "",
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.limit_name = limit_name
        #: Frames begun so far: tells a slow frame from one after another.
        self.frames = 0
        self._scratch = memoryview(bytearray(SCRATCH_BYTES)) if scratch is None else scratch
        self._allocate = allocate
        self._head = b""  # a header of which only a part has come
        self._begun = (0, 0, 0)  # stream, type, flags of the frame whose body is being received
        self._block: Optional[Block] = None
        self._view: Optional[memoryview] = None
        self._filled = 0
        self._skip = 0

    @property
    def partial_bytes(self) -> int:
        """Size of the frame of which only a part has come; 0 between frames."""
        if self._view is not None:
            return len(self._view)
        return self._skip or len(self._head)

    def allowed_s(self, frame_timeout_s: float) -> float:
        """Return how long the frame of which only a part has come may take."""
        return frame_timeout_s + min(self.partial_bytes, self.max_message_bytes) / _SLOWEST_BYTES_PER_S

    def get_buffer(self) -> memoryview:
        view = self._view
        return self._scratch if view is None else view[self._filled :]

    def received(self, count: int) -> List[Frame]:
        """Take the `count` bytes that were put into the buffer.

        Raises:
            ProtocolError: the peer does not speak ttrpc.
        """
        view = self._view
        if view is not None:
            self._filled += count
            if self._filled < len(view):
                return []
            frame: Frame = (*self._begun, view, self._block)
            self._view = self._block = None
            return [frame]
        return self._parse(self._scratch, count)

    def close(self) -> None:
        """Give back the block of a frame that will not be completed."""
        if self._block is not None:
            self._block.release()
        self._view = self._block = None

    def _parse(self, data: memoryview, count: int) -> List[Frame]:
        frames: List[Frame] = []
        pos = 0
        if self._head:
            data = memoryview(self._head + data[:count])
            count = len(data)
            self._head = b""
        elif self._skip:
            pos = min(count, self._skip)
            self._skip -= pos
        while count - pos >= _HEADER_BYTES:
            size, stream, kind, flags = HEADER.unpack_from(data, pos)
            pos += _HEADER_BYTES
            self.frames += 1
            if not REQUEST <= kind <= DATA:
                raise ProtocolError(f"the peer does not speak ttrpc: a frame of type {kind}, but 1, 2 or 3 are allowed")
            stop = pos + size
            if size > self.max_message_bytes:
                frames.append((stream, kind, flags, self._too_large(size), None))
            elif stop <= count:
                frames.append((stream, kind, flags, bytes(data[pos:stop]), None))
                pos = stop
                continue
            else:
                refused = self._begin(size, stream, kind, flags)
                if refused is None:
                    self._filled = count - pos
                    self._view[: self._filled] = data[pos:count]  # type: ignore[index]  # set by _begin
                    return frames
                frames.append((stream, kind, flags, refused, None))
            self._skip = max(0, stop - count)
            pos = min(stop, count)
        if pos < count:
            self._head = bytes(data[pos:count])
        return frames

    def _begin(self, size: int, stream: int, kind: int, flags: int) -> Optional[RemoraError]:
        """Make room for a body that has not wholly arrived; return why there is none."""
        try:
            if self._allocate is not None and size >= ALLOCATE_BYTES:
                self._block = self._allocate(size)
                self._view = self._block.view[:size]
            else:
                self._block = HeapBlock(size)
                self._view = self._block.view
        except RemoraError as error:
            return error
        self._begun = (stream, kind, flags)
        return None

    def _too_large(self, size: int) -> RemoraError:
        return MessageTooLargeError(
            f"a message of {size} bytes was sent, but this end accepts at most {self.max_message_bytes} bytes"
            f"{f' ({self.limit_name})' if self.limit_name else ''}",
            fix="send it in smaller pieces, or raise the limit at the receiver",
        )
