"""Frames of the channel mux, and finding them again when a byte stream was cut (docs/protocol-wire.md).

    byte 0       2      3       4        8        12       16
         +-------+------+-------+--------+--------+--------+---- ... ----+---------+
         | magic | type | ver=1 | stream | value  | crc32  |   payload   | ~crc32  |     big-endian; payload and the
         | f6 52 |  u8  |  u8   |  u32   |  u32   |  u32   | (DATA only) | (DATA)  |     end mark only in DATA
         +-------+------+-------+--------+--------+--------+---- ... ----+---------+

     1 HELLO   stream: sender's epoch, value: the epoch of the receiver that the sender knows, 0 for none
     2 OPEN    value: port             5 DATA    value: payload bytes, 1..65536
     3 ACCEPT  value: 0                6 WINDOW  value: how many more bytes the sender of this frame will take
     4 REJECT  value: reason           7 FIN     value: 0; no more DATA follows from the sender of this frame
                                       8 RESET   value: reason

The crc covers the first twelve bytes. A virtio-serial port loses bytes (a restored guest's first bytes are the tail of
a frame that began in another process) but never alters them, so no checksum of the payload is needed: its end mark
proves that header and payload belong together, for four bytes instead of 64 KiB of crc on an emulated CPU.
"""

from __future__ import annotations

import struct
from zlib import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple, Union

    #: Type, stream, value, payload (empty but for DATA).
    Frame = Tuple[int, int, int, memoryview]

GARBAGE, HELLO, OPEN, ACCEPT, REJECT, DATA, WINDOW, FIN, RESET = range(9)
MAX_PAYLOAD_BYTES = 65536
HEADER_BYTES = 16
#: What a sender that does not know where its peer's decoder is sends first: more than the rest of any frame.
FLUSH = bytes(HEADER_BYTES + MAX_PAYLOAD_BYTES + 4)

_MAGIC, _VERSION = 0xF652, 1
_FIELDS = struct.Struct(">HBBII")
_HEADER = struct.Struct(">HBBIII")
_CHECK = struct.Struct(">I")
_HELLO_START = _FIELDS.pack(_MAGIC, HELLO, _VERSION, 0, 0)[:4]
#: Payloads below this are joined with their header: one buffer costs less than three.
_JOIN_BYTES = 4096
_EMPTY = memoryview(b"")


def frame(kind: int, stream: int, value: int) -> bytes:
    fields = _FIELDS.pack(_MAGIC, kind, _VERSION, stream, value)
    return fields + _CHECK.pack(crc32(fields))


def data_frame(stream: int, payload: Union[bytes, memoryview]) -> List[Union[bytes, memoryview]]:
    """Return the buffers of a DATA frame; a large payload stays its own."""
    fields = _FIELDS.pack(_MAGIC, DATA, _VERSION, stream, len(payload))
    check = crc32(fields)
    head, mark = fields + _CHECK.pack(check), _CHECK.pack(check ^ 0xFFFFFFFF)
    if len(payload) < _JOIN_BYTES:
        return [b"".join((head, payload, mark))]
    return [head, payload, mark]


class Reader:
    """Cuts a byte stream into frames. Call `feed`, then `next` until it returns None.

    It starts by looking for a HELLO and sees nothing else, because what comes before may be the inside of a payload.
    Once the owner sets `strict`, frames must follow one another; where they don't, `next` returns one GARBAGE frame and
    looks for a HELLO again. It buffers at most one frame.
    """

    __slots__ = ("strict", "_buf", "_pos", "_need")

    def __init__(self) -> None:
        self.strict = False
        self._buf: Union[bytes, bytearray] = b""
        self._pos = 0
        self._need = HEADER_BYTES

    def feed(self, data: Union[bytes, bytearray, memoryview]) -> None:
        if not self._buf:
            self._buf = data if type(data) is bytes else bytes(data)
        else:
            self._buf += data  # a bytearray of our own, of which no view has been given out: see `_keep`

    def next(self) -> Optional[Frame]:
        """Return the next whole frame; None when more bytes are needed."""
        buf, pos = self._buf, self._pos
        left = len(buf) - pos
        if left < self._need:
            self._keep()
            return None
        if not self.strict:
            return self._find_hello()
        magic, kind, version, stream, value, check = _HEADER.unpack_from(buf, pos)
        start = pos + HEADER_BYTES
        if (
            magic != _MAGIC
            or version != _VERSION
            or not HELLO <= kind <= RESET
            or crc32(memoryview(buf)[pos : pos + 12]) != check
        ):
            return self._garbage()
        if kind != DATA:
            self._pos = start
            return kind, stream, value, _EMPTY
        if not 0 < value <= MAX_PAYLOAD_BYTES:
            return self._garbage()
        stop = start + value
        if stop + 4 > len(buf):
            self._need = stop + 4 - pos
            self._keep()
            return None
        if _CHECK.unpack_from(buf, stop)[0] != check ^ 0xFFFFFFFF:
            return self._garbage()
        self._pos = stop + 4
        self._need = HEADER_BYTES
        return kind, stream, value, memoryview(buf)[start:stop]

    def _garbage(self) -> Frame:
        self.strict = False
        self._need = HEADER_BYTES
        return GARBAGE, 0, 0, _EMPTY

    def _find_hello(self) -> Optional[Frame]:
        buf = self._buf
        while True:
            pos = buf.find(_HELLO_START, self._pos)
            if pos < 0:
                # The last bytes may be the beginning of one.
                self._pos = max(self._pos, len(buf) - len(_HELLO_START) + 1)
                self._keep()
                return None
            self._pos = pos
            if len(buf) - pos < HEADER_BYTES:
                self._keep()
                return None
            _magic, _kind, _version, stream, value, check = _HEADER.unpack_from(buf, pos)
            if crc32(memoryview(buf)[pos : pos + 12]) == check:
                self._pos = pos + HEADER_BYTES
                return HELLO, stream, value, _EMPTY
            self._pos = pos + 1

    def _keep(self) -> None:
        """Keep what is left in a buffer of its own: views of the old one may be in other hands."""
        if self._pos or type(self._buf) is bytes:
            self._buf = bytearray(memoryview(self._buf)[self._pos :])
            self._pos = 0
