"""A ttrpc server with a thread per running call, for functions that block: tools, tests, small services.

The connections live on a reactor in a thread of their own, with all its bounds; only the functions run in threads.
"""

from __future__ import annotations

import queue
import socket
import threading

from remora.errors import InternalError, RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.wire.ttrpc.frames import DEFAULT_MAX_MESSAGE_BYTES
from remora.wire.ttrpc.reactor import Call, ServerConnection, listen
from remora.wire.ttrpc.service import Context, Method, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Callable, Iterator, List, Optional, Set, Type

    from remora.wire.protobuf import Message
    from remora.wire.protobuf_kinds import Piece
    from remora.wire.ttrpc.service import Services

#: Messages of a client stream that wait for their function; then its connection is not read.
_MAX_WAITING = 16
#: Messages of a server stream on their way to the socket; then its function waits.
_MAX_UNSENT = 8


class Server:
    """Serves `services` on a listening socket, which it closes at the end. Use as a context manager."""

    def __init__(
        self,
        sock: socket.socket,
        services: Services,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_in_flight: int = 64,
        max_connections: int = 256,
    ) -> None:
        self._services = services
        self._max_message_bytes = max_message_bytes
        self._max_in_flight = max_in_flight
        self._reactor = Reactor()
        self._listener = listen(self._reactor, sock, self._connected, max_connections=max_connections)
        self._running: Set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._reactor.run, name="ttrpc server")
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, close all connections (which cancels their calls) and wait for the functions to return."""
        if not self._thread.is_alive():
            return
        self._reactor.post(self._listener.close)
        self._reactor.post(self._reactor.stop)
        self._thread.join()
        for thread in list(self._running):
            thread.join()
        self._reactor.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, _type: Optional[Type[BaseException]], _error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _connected(self, sock: socket.socket) -> ServerConnection:
        return ServerConnection(
            self._reactor,
            sock,
            self._handle,
            max_message_bytes=self._max_message_bytes,
            max_in_flight=self._max_in_flight,
        )

    def _handle(self, call: Call) -> None:
        method = find(self._services, call.service, call.method)
        running = _Running(self._reactor, call, method)
        thread = threading.Thread(target=self._run, args=(running,), name=f"ttrpc {call.service}/{call.method}")
        self._running.add(thread)
        thread.start()

    def _run(self, running: _Running) -> None:
        try:
            running.run()
        finally:
            self._running.discard(threading.current_thread())


class _Running:
    """A call between the reactor's thread, which owns it, and the thread of its function."""

    def __init__(self, reactor: Reactor, call: Call, method: Method) -> None:
        self._reactor = reactor
        self._call = call
        self._method = method
        self._context = Context(call)
        self._waiting: queue.SimpleQueue[Optional[Piece]] = queue.SimpleQueue()
        self._count = 0  # of what is in the queue; changed in the reactor's thread only
        self._paused = False
        self._unsent = threading.Semaphore(_MAX_UNSENT)
        self._first: List[Piece] = [call.payload] if call.payload or not method.client_streaming else []
        call.on_message = self._received
        call.on_half_close = lambda: self._waiting.put(None)
        call.on_cancel(self._cancelled)
        if not call.client_open:
            self._waiting.put(None)

    # -- in the function's thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        method, call = self._method, self._call
        try:
            request = self._messages() if method.client_streaming else method.request_cls.decode(self._first[0])
            result = method.function(request, self._context)
            if method.server_streaming:
                for message in result:
                    self._send(message)
                self._post(call.finish)
            else:
                pieces = result.encode()
                self._post(lambda: call.respond(pieces))
        except RemoraError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the border of a call: reported, and answered
            self._reactor.on_error(error)
            self._fail(InternalError(f"{call.service}/{call.method}: internal error", fix="see the server's log"))

    def _fail(self, error: RemoraError) -> None:
        self._post(lambda: self._call.fail(error))

    def _post(self, action: Callable[[], object]) -> None:
        def act() -> None:
            action()

        self._reactor.post(act)

    def _messages(self) -> Iterator[Message]:
        for payload in self._first:
            yield self._method.request_cls.decode(payload)
        while True:
            payload_or_end = self._waiting.get()
            if payload_or_end is None:
                break
            self._reactor.post(self._taken)
            yield self._method.request_cls.decode(payload_or_end)
        if self._context.cancelled:
            raise UnavailableError("the client is gone")

    def _send(self, message: Message) -> None:
        self._unsent.acquire()
        if self._context.cancelled:
            raise UnavailableError("the client is gone")
        pieces = message.encode()
        self._post(lambda: self._call.send(pieces, on_sent=self._unsent.release))

    # -- in the reactor's thread ------------------------------------------------------------------------------------

    def _received(self, payload: Piece, release: Callable[[], None]) -> None:
        self._waiting.put(payload)  # `release` is not needed: blocks here are plain memory
        self._count += 1
        if self._count >= _MAX_WAITING and not self._paused:
            self._paused = True
            self._connection.pause()

    def _taken(self) -> None:
        self._count -= 1
        if self._paused and self._count < _MAX_WAITING // 2:
            self._paused = False
            self._connection.resume()

    def _cancelled(self, _reason: RemoraError) -> None:
        self._context.cancelled = True
        self._waiting.put(None)
        self._unsent.release()

    @property
    def _connection(self) -> ServerConnection:
        connection = self._call.connection
        assert isinstance(connection, ServerConnection)  # calls of this server have no other
        return connection
