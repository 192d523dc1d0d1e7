"""Carries bytes between a descriptor in the guest and a stream of the channel, in one direction each.

Backpressure needs no buffer of its own: what the channel does not take stays in the kernel's pipe, where it stops the
writing process, and what a process does not read is not credited to the peer. Whatever was read from a descriptor but
not yet taken by a stream is kept for the next stream, so output written while nobody is attached is never lost.
"""

from __future__ import annotations

import errno
import os
from collections import deque

from remora import reactor as reactor_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Deque, List, Optional

    from remora.guest.streams import Stream
    from remora.reactor import Reactor

_READ_BYTES = 65536
#: Reads per turn of the loop: one busy pipe must not hold up a signal.
_TURNS = 4


class FromDescriptor:
    """Reads `fd` into whichever stream is attached; owns `fd`.

    Args:
        on_end: called once, when the end of `fd` was reached and all bytes were handed to a stream.
    """

    def __init__(self, reactor: Reactor, fd: int, on_end: Optional[Callable[[], None]] = None) -> None:
        os.set_blocking(fd, False)
        self._reactor = reactor
        self._fd = fd
        self._stream: Optional[Stream] = None
        self._rest: bytes = b""
        self._watched = False
        self._held = False
        self._at_end = False
        self._on_end = on_end
        self._on_empty: List[Callable[[], None]] = []
        self.ended = False

    @property
    def stream(self) -> Optional[Stream]:
        return self._stream

    def attach(self, stream: Stream) -> None:
        """Send what comes from now on, and what is kept, to `stream`; the one attached before is closed."""
        if self._stream is not None:
            self._stream.reset()
        self._stream = stream
        stream.on_writable = self._pump
        if self.ended:
            stream.close_write()
        else:
            self._pump()

    def detach(self) -> None:
        """The stream is gone: keep what comes until the next one."""
        self._stream = None
        self._watch(False)
        self._tell_empty()

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call once when everything written so far has been handed over, or nobody is attached to take it."""
        if self.ended:
            callback()
            return
        self._on_empty.append(callback)
        self._pump()

    def hold(self, held: bool) -> None:
        """Stop, or go on, taking bytes (for Sync)."""
        self._held = held
        if held:
            self._watch(False)
        elif not self.ended:
            self._pump()

    def close(self) -> None:
        self._watch(False)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.ended = True
        self._tell_empty()

    def _pump(self, _events: int = 0) -> None:
        stream = self._stream
        if stream is None:
            self._tell_empty()
        if stream is None or self._held or self.ended:
            return
        for _ in range(_TURNS):
            if not self._rest and not self._at_end and not self._read():
                self._watch(True)
                self._tell_empty()
                return
            if self._rest:
                taken = stream.send(self._rest)
                if taken < len(self._rest):
                    self._rest = self._rest[taken:]
                    self._watch(False)  # the stream calls when it can take more
                    return
                self._rest = b""
            if self._at_end:
                self._end()
                return
        self._watch(True)

    def _read(self) -> bool:
        """Fill `_rest`, or set `_at_end`; False if there is nothing yet."""
        try:
            self._rest = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            # EIO: the last process closed the terminal. ECONNRESET: the peer of a socket died.
            if error.errno not in (errno.EIO, errno.ECONNRESET):
                raise
        self._at_end = not self._rest
        return True

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close_write()
        self.close()
        if self._on_end is not None:
            self._on_end()

    def _tell_empty(self) -> None:
        callbacks, self._on_empty = self._on_empty, []
        for callback in callbacks:
            callback()

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watched and self._fd >= 0:
            self._watched = wanted
            if wanted:
                self._reactor.register(self._fd, reactor_module.READ, self._pump)
            else:
                self._reactor.unregister(self._fd)


class ToDescriptor:
    """Writes what streams bring into `fd`; owns `fd`. Bytes are credited to the peer once `fd` has taken them.

    Args:
        on_end: called once, with `fd` still open: the peer sent its end and everything was written, or `fd` is broken.
    """

    def __init__(self, reactor: Reactor, fd: int, on_end: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._reactor = reactor
        self._fd = fd
        self._waiting: Deque[bytes] = deque()
        self._watched = False
        self._eof = False
        self._broken = False
        self._told = False
        self._on_end = on_end
        self._stream: Optional[Stream] = None
        #: Bytes waiting that came from a stream that is gone: the next stream gets no credit for them.
        self._owed_to_nobody = 0

    def attach(self, stream: Stream) -> None:
        if self._stream is not None:
            self._stream.reset()
            self.detach(self._stream)
        self._stream = stream
        stream.on_data = self.feed
        stream.on_eof = self.finish

    def detach(self, stream: Stream) -> None:
        """The stream broke off: no end of file, the next stream goes on."""
        if self._stream is stream:
            self._stream = None
            self._owed_to_nobody = sum(map(len, self._waiting))

    def feed(self, data: memoryview) -> None:
        """Take `data`, which is valid only during this call."""
        if self._broken:
            self._credit(len(data))
            return
        taken = 0
        if not self._waiting:
            taken = self._write(data)
        if taken < len(data) and not self._broken:
            self._waiting.append(bytes(data[taken:]))
            self._watch(True)

    def finish(self) -> None:
        """No more is to come: end the descriptor once everything is written."""
        self._eof = True
        if not self._waiting:
            self._end()

    def close(self) -> None:
        self._watch(False)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._broken = True
        self._waiting.clear()

    def _flush(self, _events: int = 0) -> None:
        while self._waiting:
            data = self._waiting.popleft()
            taken = self._write(memoryview(data))
            if self._broken:
                return
            if taken < len(data):
                self._waiting.appendleft(data[taken:])
                return
        self._watch(False)
        if self._eof:
            self._end()

    def _write(self, data: memoryview) -> int:
        try:
            taken = os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                raise
            # Nobody reads: what comes is credited and dropped, as a pipe with a dead reader would have it.
            dropped = len(data) + sum(map(len, self._waiting))
            self._broken = True
            self._waiting.clear()
            self._credit(dropped)
            self._end()
            return 0
        self._credit(taken)
        return taken

    def _end(self) -> None:
        self._watch(False)
        if not self._told:
            self._told = True
            self._reactor.call_soon(self._on_end)

    def _credit(self, taken: int) -> None:
        nobody = min(self._owed_to_nobody, taken)
        self._owed_to_nobody -= nobody
        taken -= nobody
        if self._stream is not None:
            self._stream.consumed(taken)

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watched and self._fd >= 0:
            self._watched = wanted
            if wanted:
                self._reactor.register(self._fd, reactor_module.WRITE, self._flush)
            else:
                self._reactor.unregister(self._fd)
