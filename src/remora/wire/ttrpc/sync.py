"""A blocking ttrpc client that many threads share, without a thread of its own.

Calls are pipelined on one connection. Of the threads that wait, one (the leader) holds the read lock and reads for all;
when it has its answer it passes the lock on. So a single caller pays for no hand-over: it sends and receives by itself,
which keeps a small call within a few times a bare socket echo. A cloned microVM also has no reader thread to revive.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from _thread import allocate_lock

from remora.errors import DeadlineExceededError, ProtocolError, RemoraError, UnavailableError
from remora.wire.protobuf import DEFAULT, gather
from remora.wire.ttrpc.core import ClientStream, Streams, data_frame, request_frame, stream_flags
from remora.wire.ttrpc.frames import DEFAULT_MAX_MESSAGE_BYTES, NO_DATA, REMOTE_CLOSED, FrameDecoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Dict, Generic, Iterator, List, Optional, Type, TypeVar

    from remora.wire.protobuf import Limits, Message
    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.core import Body, Metadata
    from remora.wire.ttrpc.frames import Allocate

    M = TypeVar("M", bound=Message)
else:
    M = None

    class Generic:
        """Stands in for typing.Generic: a guest need not load typing to make a call."""

        def __class_getitem__(cls, _item):
            return cls


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


class Client:
    """A ttrpc connection. Closes `sock` when it is closed.

    Args:
        sock: A connected stream socket.
        max_message_bytes: Largest message accepted from the server.
        allocate: Makes the blocks of large answers, see `frames.FrameDecoder`.
        limits: Bounds of the decoder for answers.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        allocate: Optional[Allocate] = None,
        limits: Limits = DEFAULT,
    ) -> None:
        sock.setblocking(True)
        # TLS would take the end of a wait for an error of its own.
        self._waits_briefly = type(sock) is socket.socket
        if self._waits_briefly:
            _bound_waits(sock)
        self._sock = sock
        self._limits = limits
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

    def call(
        self,
        service: str,
        method: str,
        request: Body,
        response_cls: Type[M],
        *,
        timeout_s: Optional[float] = None,
        metadata: Optional[Metadata] = None,
    ) -> M:
        """Make a unary call.

        Raises:
            DeadlineExceededError: no answer within `timeout_s`; the server has been told the same bound.
            UnavailableError: the connection is or was lost; the call may have been made.
            RemoraError: the server's answer, by its code.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            with self._sending:
                stream = self._streams.open()
                try:
                    self._send(
                        request_frame(stream.id, service, method, request, timeout_s=timeout_s, metadata=metadata),
                        deadline_s,
                    )
                except BaseException:
                    self._streams.forget(stream)
                    raise
        finally:
            if self._streams.closed is not None:
                self._close_socket()
        payload = self._take(stream, deadline_s)
        if payload is None:
            raise ProtocolError(f"{service}/{method}: the server ended the call without an answer")
        return response_cls.decode(payload, limits=self._limits)

    def stream(
        self,
        service: str,
        method: str,
        request: Optional[Body],
        response_cls: Type[M],
        *,
        client_streaming: bool = False,
        server_streaming: bool = False,
        timeout_s: Optional[float] = None,
        metadata: Optional[Metadata] = None,
    ) -> Stream[M]:
        """Begin a streaming call. `request` is the first message; None if all messages come by `Stream.send`."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        flags = stream_flags(client_streaming, request is not None)
        try:
            with self._sending:
                state = self._streams.open(server_streaming=server_streaming, client_streaming=client_streaming)
                try:
                    frame = request_frame(
                        state.id, service, method, request, flags=flags, timeout_s=timeout_s, metadata=metadata
                    )
                    self._send(frame, deadline_s)
                except BaseException:
                    self._streams.forget(state)
                    raise
        finally:
            if self._streams.closed is not None:
                self._close_socket()
        return Stream(self, state, response_cls, deadline_s)

    def close(self) -> None:
        """Close the connection; every waiting call gets an UnavailableError."""
        self._lost(UnavailableError("the connection was closed at this end"))
        self._close_socket()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _type: Optional[Type[BaseException]], _error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        self.close()

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

    def _take(self, stream: ClientStream, deadline_s: Optional[float]) -> Optional[Piece]:
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


class Stream(Generic[M]):
    """A streaming call. Iterate for what the server sends; `send` and `close_send` for what this end sends."""

    def __init__(self, client: Client, state: ClientStream, response_cls: Type[M], deadline_s: Optional[float]) -> None:
        self._client = client
        self._state = state
        self._response_cls = response_cls
        self._deadline_s = deadline_s

    def send(self, message: Body) -> None:
        """Send one message.

        Raises:
            RemoraError: the server has ended the call.
        """
        self._transmit(message, 0)

    def close_send(self) -> None:
        """Tell the server that no more messages follow."""
        if self._state.client_open:
            self._transmit(None, REMOTE_CLOSED | NO_DATA)
            self._state.client_open = False

    def receive(self) -> Optional[M]:
        """Return the server's next message, None after the last.

        Raises:
            RemoraError: the server's error status, or the connection is lost.
        """
        payload = self._client._take(self._state, self._deadline_s)
        return None if payload is None else self._response_cls.decode(payload, limits=self._client._limits)

    def cancel(self) -> None:
        """Give the call up. What the server still sends for it is dropped."""
        self._client._streams.forget(self._state)

    def __iter__(self) -> Iterator[M]:
        while True:
            message = self.receive()
            if message is None:
                return
            yield message

    def _transmit(self, message: Optional[Body], flags: int) -> None:
        client, state = self._client, self._state
        try:
            with client._sending:
                if state.error is not None:
                    raise state.error
                if not state.client_open:
                    raise ProtocolError(f"stream {state.id} is closed for sending")
                client._send(data_frame(state.id, message, flags), self._deadline_s)
        finally:
            if client._streams.closed is not None:
                client._close_socket()


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
