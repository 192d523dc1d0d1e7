"""One connection that many threads share, without a thread of its own: the blocking client's socket and locks.

Calls are pipelined. Of the threads that wait, one (the leader) holds the read lock and reads for all; when it has its
answer it passes the lock on. So a single caller pays for no hand-over: it sends and receives by itself, which keeps a
small call within a few times a bare socket echo. A cloned microVM also has no reader thread to revive.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from _thread import allocate_lock

from remora.errors import DeadlineExceededError, ProtocolError, RemoraError, UnavailableError
from remora.wire.protobuf import gather
from remora.wire.ttrpc.core import ClientStream, Streams, data_frame, request_frame
from remora.wire.ttrpc.frames import FrameDecoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.core import Body, Metadata
    from remora.wire.ttrpc.frames import Allocate

_MAX_PIECES = 1024
#: A receive ends by itself after so many seconds, so that a deadline further away needs no poll before it.
_WAIT_S = 1
_DONTWAIT = socket.MSG_DONTWAIT


def _bound_waits(sock: socket.socket) -> None:
    """Have each receive end by itself after `_WAIT_S`.

    Python takes no structure as an option of a vsock (sock_setsockopt in its socketmodule.c), so that an object of
    another family sets it.
    """
    alias = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.fileno())
    try:
        alias.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _WAIT_S, 0))
    finally:
        alias.detach()


class Connection:
    """What calls are made over. Owns `sock`.

    Args:
        sock: A connected stream socket.
        max_message_bytes: Largest message accepted from the server.
        allocate: Makes the blocks of large answers, see `frames.FrameDecoder`.
    """

    def __init__(self, sock: socket.socket, max_message_bytes: int, allocate: Optional[Allocate]) -> None:
        sock.setblocking(True)
        # TLS would take the end of a wait for an error of its own.
        self._waits_briefly = type(sock) is socket.socket
        if self._waits_briefly:
            _bound_waits(sock)
        self._sock = sock
        self._decoder = FrameDecoder(max_message_bytes, allocate=allocate)
        self._streams = Streams()
        self._sending = allocate_lock()  # held while ids are handed out and frames sent: both must keep one order
        self._reading = allocate_lock()  # held by the leader
        self._readable = select.poll()  # the leader's
        self._readable.register(sock, select.POLLIN)
        self._sleepers: Dict[int, Any] = {}  # stream id -> lock that wakes its waiting thread

    @property
    def closed(self) -> bool:
        """True once the connection is gone; every further call raises UnavailableError."""
        return self._streams.closed is not None

    def close(self) -> None:
        """Close the connection; every waiting call gets an UnavailableError."""
        self._lost(UnavailableError("the connection was closed at this end"))
        self._close_socket()

    # -- what calls use ---------------------------------------------------------------------------------------------

    def begin(
        self,
        service: str,
        method: str,
        request: Optional[Body],
        deadline_s: Optional[float],
        *,
        flags: int = 0,
        client_streaming: bool = False,
        server_streaming: bool = False,
        timeout_s: Optional[float] = None,
        metadata: Optional[Metadata] = None,
    ) -> ClientStream:
        """Open a stream and send its request."""
        streams = self._streams
        try:
            with self._sending:
                stream = streams.open(server_streaming=server_streaming, client_streaming=client_streaming)
                try:
                    frame = request_frame(
                        stream.id, service, method, request, flags=flags, timeout_s=timeout_s, metadata=metadata
                    )
                    self._send(frame, deadline_s)
                except BaseException:
                    streams.forget(stream)
                    raise
        finally:
            if streams.closed is not None:
                self._close_socket()
        return stream

    def transmit(self, stream: ClientStream, message: Optional[Body], flags: int, deadline_s: Optional[float]) -> None:
        """Send one more message of a stream."""
        try:
            with self._sending:
                if stream.error is not None:
                    raise stream.error
                if not stream.client_open:
                    raise ProtocolError(f"stream {stream.id} is closed for sending")
                self._send(data_frame(stream.id, message, flags), deadline_s)
        finally:
            if self._streams.closed is not None:
                self._close_socket()

    def forget(self, stream: ClientStream) -> None:
        """Drop what still comes for a stream."""
        self._streams.forget(stream)

    # -- sending: the caller holds `_sending` -----------------------------------------------------------------------

    def _send(self, pieces: List[Piece], deadline_s: Optional[float]) -> None:
        pieces = gather(pieces)
        total = sum(map(len, pieces))
        done = 0
        sock = self._sock
        try:
            while True:
                try:
                    if len(pieces) == 1:
                        sent = sock.send(pieces[0], _DONTWAIT)
                    else:
                        sent = sock.sendmsg(pieces[:_MAX_PIECES], (), _DONTWAIT)
                except BlockingIOError:
                    sent = 0
                done += sent
                if done == total:
                    return
                while sent >= len(pieces[0]):
                    sent -= len(pieces.pop(0))
                if sent:
                    pieces[0] = memoryview(pieces[0])[sent:]
                self._wait_writable(deadline_s)
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise self._lost(UnavailableError(f"the connection was lost while sending: {error}")) from error
        except BaseException:
            if 0 < done < total:
                self._lost(UnavailableError("the connection was closed: a request could not be sent whole"))
            raise

    def _wait_writable(self, deadline_s: Optional[float]) -> None:
        """Wait for room in the socket; read meanwhile, for a server may only take more when it gets rid of answers."""
        poll = select.poll()
        lead = self._reading.acquire(False)
        try:
            poll.register(self._sock, select.POLLOUT | select.POLLIN if lead else select.POLLOUT)
            # Not longer than this without asking again who reads: the leader of now may have gone.
            timeout_ms = _milliseconds(deadline_s) if lead else min(_milliseconds(deadline_s, 100), 100)
            for _fd, events in poll.poll(timeout_ms):
                if lead and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self._read()
        finally:
            if lead:
                self._reading.release()
                self._promote()
        if self._streams.closed is not None:
            raise self._streams.closed
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise DeadlineExceededError("the deadline passed while the request was sent")

    # -- receiving --------------------------------------------------------------------------------------------------

    def take(self, stream: ClientStream, deadline_s: Optional[float]) -> Optional[Piece]:
        """Return the next message of `stream`, None at its end; wait for it, reading for all if nobody else does."""
        reading = self._reading
        while not stream.ready:
            if reading.acquire(False):
                try:
                    while not stream.ready:
                        if self._must_poll(deadline_s):
                            self._wait_readable(stream, deadline_s)
                        self._read()
                finally:
                    reading.release()
                    if self._sleepers:
                        self._promote()
                    if self._streams.closed is not None:
                        self._close_socket()
            else:
                self._sleep(stream, deadline_s)
        return stream.take()

    def _sleep(self, stream: ClientStream, deadline_s: Optional[float]) -> None:
        """Wait until the leader has news for this stream, or gives up the lead."""
        wake = allocate_lock()
        wake.acquire()
        self._sleepers[stream.id] = wake
        stream.on_news = lambda: _wake(wake)
        try:
            if stream.ready:
                return
            if self._reading.acquire(False):  # the leader left before it could see us
                self._reading.release()
                return
            if deadline_s is None:
                wake.acquire()
            elif not wake.acquire(True, max(0.0, deadline_s - time.monotonic())):
                self._expired(stream)
        finally:
            stream.on_news = None
            self._sleepers.pop(stream.id, None)
            # Woken to lead, but not going to (deadline, interrupt): somebody else must.
            if self._sleepers and not self._reading.locked():
                self._promote()

    def _promote(self) -> None:
        """Wake one sleeper, which takes the lead."""
        for wake in list(self._sleepers.values()):
            if _wake(wake):
                return

    def _must_poll(self, deadline_s: Optional[float]) -> bool:
        """True unless a receive ends by itself before the deadline; a wait without end should not end every second."""
        if deadline_s is None:
            return self._waits_briefly
        return not self._waits_briefly or deadline_s - time.monotonic() < _WAIT_S

    def _wait_readable(self, stream: ClientStream, deadline_s: Optional[float]) -> None:
        if not self._readable.poll(_milliseconds(deadline_s)):
            self._expired(stream)

    def _expired(self, stream: ClientStream) -> None:
        self._streams.forget(stream)
        raise DeadlineExceededError("the deadline passed before the server answered")

    def _read(self) -> None:
        """Receive once and hand out what is whole. The caller holds `_reading`."""
        decoder = self._decoder
        try:
            count = self._sock.recv_into(decoder.get_buffer())
        except BlockingIOError:
            return  # nothing came for `_WAIT_S`
        except (OSError, ValueError) as error:
            self._lost(UnavailableError(f"the connection was lost: {error}"))
            return
        if count == 0:
            self._lost(UnavailableError("the server has closed the connection"))
            return
        try:
            for frame in decoder.received(count):
                self._streams.received(frame)
        except ProtocolError as error:
            self._lost(error)
        except BaseException:
            # Ctrl-C between receiving and sorting: bytes are gone, and what follows can't be told apart any more.
            self._lost(UnavailableError("the connection was closed: reading was interrupted"))
            raise

    def _lost(self, error: RemoraError) -> RemoraError:
        """End everything; return the error that ended it, which may be an earlier one.

        Whoever calls this calls `_close_socket` when it holds neither lock.
        """
        if self._streams.closed is None:
            self._streams.fail(error)
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever is blocked in recv or poll
            except OSError:
                pass  # not connected any more
        closed = self._streams.closed
        return error if closed is None else closed

    def _close_socket(self) -> None:
        """Close the descriptor when no thread can be about to use its number.

        The system gives the number to the next socket at once: a thread between asking for it and polling it would wait
        on, or send to, somebody else's connection. After `_lost` nobody holds a lock for long.
        """
        with self._reading, self._sending:
            self._sock.close()


def _wake(lock: Any) -> bool:
    """Wake the thread that waits on `lock`; False if it has been woken already."""
    if not lock.locked():
        return False
    try:
        lock.release()
    except RuntimeError:  # another thread was quicker
        return False
    return True


def _milliseconds(deadline_s: Optional[float], default: int = -1) -> int:
    return default if deadline_s is None else max(0, int((deadline_s - time.monotonic()) * 1000) + 1)
