"""The asyncio session's connection: unary ttrpc calls of many tasks, pipelined.

It receives straight into the frame decoder's buffers (`BufferedProtocol`), so that a large answer is not copied; the
streams of `asyncio.open_connection` would copy it twice. A task that is cancelled gives up its answer and nothing else:
a frame is handed to the transport whole, with no point at which a task could be interrupted.
"""

from __future__ import annotations

import asyncio
import time

from remora.client import transport
from remora.errors import DeadlineExceededError, ProtocolError, RemoraError, UnavailableError
from remora.wire.protobuf import gather
from remora.wire.ttrpc.core import Streams, request_frame
from remora.wire.ttrpc.frames import FrameDecoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Optional, Type, TypeVar

    from remora.client.address import Address
    from remora.wire.protobuf import Message

    Response = TypeVar("Response", bound=Message)


async def open_client(address: Address, timeout_s: float, *, max_message_bytes: int) -> Client:
    """Return a connected client.

    Raises:
        OSError: nothing answers there; TimeoutError in time.
    """
    loop = asyncio.get_running_loop()
    sock = transport.new_socket(address)
    try:
        sock.setblocking(False)
        await asyncio.wait_for(loop.sock_connect(sock, transport.plan(address)[1]), timeout_s)
        _transport, client = await loop.create_connection(lambda: Client(max_message_bytes), sock=sock)
    except asyncio.TimeoutError as error:  # another class than TimeoutError before Python 3.11
        sock.close()
        raise TimeoutError("no answer in time") from error
    except BaseException:
        sock.close()
        raise
    return client


class Client(asyncio.BufferedProtocol):
    """A ttrpc connection of one event loop."""

    def __init__(self, max_message_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder(max_message_bytes)
        self._streams = Streams()
        self._transport: Any = None  # asyncio.Transport; connection_made is typed with its base
        self._paused = False
        #: Who waits to send, in order.
        self._senders: List[asyncio.Future[None]] = []
        self._gone: asyncio.Future[None] = self._loop.create_future()

    @property
    def closed(self) -> bool:
        """True once the connection is gone; every further call raises UnavailableError."""
        return self._streams.closed is not None

    async def call(
        self, service: str, method: str, request: Message, response_cls: Type[Response], *, timeout_s: float
    ) -> Response:
        """Make a unary call. Calls are sent in the order in which their tasks began.

        Raises:
            DeadlineExceededError: no answer within `timeout_s`; the server has been told the same bound.
            UnavailableError: the connection is or was lost; the call may have been made.
            RemoraError: the server's answer, by its code.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._paused and not self.closed:
            sender: asyncio.Future[None] = self._loop.create_future()
            self._senders.append(sender)
            await self._until(sender, deadline_s)
        stream = self._streams.open()
        try:
            news: asyncio.Future[None] = self._loop.create_future()
            stream.on_news = lambda: _finish(news)
            for piece in gather(request_frame(stream.id, service, method, request, timeout_s=timeout_s)):
                self._transport.write(piece)
            await self._until(news, deadline_s)
            payload = stream.take()
        finally:
            stream.on_news = None
            self._streams.forget(stream)
        if payload is None:
            raise ProtocolError(f"{service}/{method}: the server ended the call without an answer")
        return response_cls.decode(payload)

    async def close(self) -> None:
        """Close the connection; every waiting call gets an UnavailableError."""
        self._lost(UnavailableError("the connection was closed at this end"))
        # The socket is closed in a later turn of the loop; asyncio.run must not end before.
        await asyncio.shield(self._gone)

    async def _until(self, future: asyncio.Future[None], deadline_s: float) -> None:
        timer = self._loop.call_later(max(0.0, deadline_s - time.monotonic()), _expire, future)
        try:
            await future
        finally:
            timer.cancel()

    def _lost(self, error: RemoraError) -> None:
        if self._streams.closed is None:
            self._streams.fail(error)
            self._decoder.close()
        self._transport.abort()  # what has not been sent has no use any more

    # -- asyncio.BufferedProtocol -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._decoder.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._decoder.received(nbytes):
                self._streams.received(frame)
        except ProtocolError as error:
            self._lost(error)

    def eof_received(self) -> Optional[bool]:
        self._lost(UnavailableError("the server has closed the connection"))
        return None

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        senders, self._senders = self._senders, []
        for sender in senders:
            _finish(sender)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._lost(UnavailableError(f"the connection was lost: {exc or 'closed'}"))
        self.resume_writing()
        _finish(self._gone)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceededError("the deadline passed before the server answered"))
