"""The asyncio server: a task per running call, on the same core as the reactor's server."""

from __future__ import annotations

import asyncio
import socket
import time

from remora.errors import InternalError, RemoraError
from remora.wire.ttrpc.aio import Connection
from remora.wire.ttrpc.calls import Call, Calls
from remora.wire.ttrpc.frames import DEFAULT_MAX_MESSAGE_BYTES
from remora.wire.ttrpc.service import Context, Method, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, AsyncIterator, Callable, List, Optional, Set

    from remora.wire.protobuf import Message
    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.frames import Frame
    from remora.wire.ttrpc.service import Services

#: Messages of a client stream that wait for their function; then its connection is not read.
_MAX_WAITING = 16


class _ServerConnection(Connection):
    def __init__(self, server: Server) -> None:
        super().__init__(server.max_message_bytes)
        self._server = server
        self._calls = Calls(self)
        self._tasks: Set[asyncio.Task[None]] = set()
        self._timer: Optional[asyncio.TimerHandle] = None
        self._frame_timer: Optional[asyncio.TimerHandle] = None
        self._paused = 0
        server.connections.add(self)

    def transmit(self, pieces: List[Piece], on_sent: Optional[Callable[[], None]] = None) -> None:
        """(`calls.Transport`) The loop keeps what it cannot send at once: nothing is needed after this."""
        self.write(pieces)
        if on_sent is not None:
            on_sent()

    def call_ended(self, call: Call) -> None:
        """(`calls.Transport`)"""
        self.update_reading()

    def refused(self, error: RemoraError) -> None:
        """(`calls.Transport`) The peer has been told; this server keeps no log."""

    def report(self, error: BaseException) -> None:
        """(`calls.Transport`)"""
        asyncio.get_running_loop().call_exception_handler({"message": "ttrpc call failed", "exception": error})

    def frame(self, frame: Frame) -> None:
        call = self._calls.received(frame)
        if call is None:
            return
        try:
            method = find(self._server.services, call.service, call.method)
            task = asyncio.get_running_loop().create_task(_Running(self, call, method).run())
        except RemoraError as error:
            call.fail(error)
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel(_reason: RemoraError) -> None:
            task.cancel()

        call.on_cancel(cancel)
        self._watch_deadlines()
        self.update_reading()

    def buffer_updated(self, count: int) -> None:
        super().buffer_updated(count)
        if self._frame_timer is None and self._decoder.partial_bytes:
            self._watch_frame()

    def lost(self, error: RemoraError) -> None:
        self._server.connections.discard(self)
        for timer in (self._timer, self._frame_timer):
            if timer is not None:
                timer.cancel()
        self._calls.cancel_all(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.update_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.update_reading()

    def pause(self, count: int) -> None:
        self._paused += count
        self.update_reading()

    def update_reading(self) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        full = self._paused or len(self._calls.active) >= self._server.max_in_flight or not self.writable.is_set()
        if full and transport.is_reading():
            transport.pause_reading()
        elif not full and not transport.is_reading():
            transport.resume_reading()

    def _watch_frame(self) -> None:
        mark = self._decoder.frames

        def check() -> None:
            self._frame_timer = None
            if not self._decoder.partial_bytes:
                return
            if self._decoder.frames == mark and self.transport is not None and self.transport.is_reading():
                self.abort()  # it stopped in the middle of a message
            else:
                self._watch_frame()

        allowed_s = self._decoder.allowed_s(self._server.frame_timeout_s)
        self._frame_timer = asyncio.get_running_loop().call_later(allowed_s, check)

    def _watch_deadlines(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = self._calls.expire()
        if next_s is not None:
            self._timer = asyncio.get_running_loop().call_later(next_s - time.monotonic(), self._watch_deadlines)


class _Running:
    """One call and the task of its function."""

    def __init__(self, connection: _ServerConnection, call: Call, method: Method) -> None:
        self._connection = connection
        self._call = call
        self._method = method
        self._waiting: asyncio.Queue[Optional[Piece]] = asyncio.Queue()
        self._holding = False
        if call.payload or not method.client_streaming:
            self._waiting.put_nowait(call.payload)
        if call.client_open:
            call.on_message = self._received
            call.on_half_close = lambda: self._waiting.put_nowait(None)
        else:
            self._waiting.put_nowait(None)

    async def run(self) -> None:
        method, call = self._method, self._call
        try:
            request: Any = self._messages() if method.client_streaming else await self._one()
            result = method.function(request, Context(call))
            if not method.server_streaming:
                call.respond(await result)
                return
            async for message in result:
                await self._connection.writable.wait()
                if not call.send(message):
                    return
            call.finish()
        except RemoraError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 - the border of a call: reported, and answered
            call.fail(InternalError(f"{call.service}/{call.method}: internal error", fix="see the server's log"))
            self._connection.report(error)
        finally:
            self._hold(False)

    async def _one(self) -> Message:
        return self._method.request_cls.decode(await self._waiting.get() or b"")

    async def _messages(self) -> AsyncIterator[Message]:
        while True:
            payload = await self._waiting.get()
            if self._waiting.qsize() < _MAX_WAITING // 2:
                self._hold(False)
            if payload is None:
                return
            yield self._method.request_cls.decode(payload)

    def _received(self, payload: Piece, _release: Callable[[], None]) -> None:
        self._waiting.put_nowait(payload)  # `release` is not needed: blocks here are plain memory
        if self._waiting.qsize() >= _MAX_WAITING:
            self._hold(True)

    def _hold(self, hold: bool) -> None:
        if hold != self._holding:
            self._holding = hold
            self._connection.pause(1 if hold else -1)


class Server:
    """Serves `services` on a listening socket. Make it with `start`; close it with `close`."""

    def __init__(self, services: Services, max_message_bytes: int, max_in_flight: int, frame_timeout_s: float) -> None:
        self.services = services
        self.max_message_bytes = max_message_bytes
        self.max_in_flight = max_in_flight
        self.frame_timeout_s = frame_timeout_s
        self.connections: Set[_ServerConnection] = set()
        self._server: Optional[asyncio.AbstractServer] = None

    @classmethod
    async def start(
        cls,
        sock: socket.socket,
        services: Services,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_in_flight: int = 64,
        frame_timeout_s: float = 30.0,
    ) -> Server:
        """Return a server that accepts on `sock`; bounds per connection as in `reactor.ServerConnection`."""
        server = cls(services, max_message_bytes, max_in_flight, frame_timeout_s)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        server._server = await loop.create_server(lambda: _ServerConnection(server), sock=sock)
        return server

    async def close(self) -> None:
        """Stop accepting, close all connections and wait for the tasks of their calls."""
        if self._server is not None:
            self._server.close()
        connections = list(self.connections)
        tasks = [task for connection in connections for task in connection._tasks]
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.gone.wait()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
