"""The blocking ttrpc client: calls and streams over a connection that many threads share (`sync_connection`)."""

from __future__ import annotations

import time

from remora.errors import ProtocolError
from remora.wire.protobuf import DEFAULT
from remora.wire.ttrpc.core import stream_flags
from remora.wire.ttrpc.frames import DEFAULT_MAX_MESSAGE_BYTES, NO_DATA, REMOTE_CLOSED
from remora.wire.ttrpc.sync_connection import Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Generic, Iterator, Optional, Type, TypeVar

    from remora.wire.protobuf import Limits, Message
    from remora.wire.ttrpc.core import Body, ClientStream, Metadata
    from remora.wire.ttrpc.frames import Allocate

    M = TypeVar("M", bound=Message)
else:
    M = None

    class Generic:
        """Stands in for typing.Generic: a guest need not load typing to make a call."""

        def __class_getitem__(cls, _item):
            return cls


class Client(Connection):
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
        super().__init__(sock, max_message_bytes, allocate)
        self.limits = limits

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
        stream = self.begin(service, method, request, deadline_s, timeout_s=timeout_s, metadata=metadata)
        payload = self.take(stream, deadline_s)
        if payload is None:
            raise ProtocolError(f"{service}/{method}: the server ended the call without an answer")
        return response_cls.decode(payload, limits=self.limits)

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
        state = self.begin(
            service,
            method,
            request,
            deadline_s,
            flags=stream_flags(client_streaming, request is not None),
            client_streaming=client_streaming,
            server_streaming=server_streaming,
            timeout_s=timeout_s,
            metadata=metadata,
        )
        return Stream(self, state, response_cls, deadline_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _type: Optional[Type[BaseException]], _error: Optional[BaseException], _trace: Optional[TracebackType]
    ) -> None:
        self.close()


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
        self._client.transmit(self._state, message, 0, self._deadline_s)

    def close_send(self) -> None:
        """Tell the server that no more messages follow."""
        if self._state.client_open:
            self._client.transmit(self._state, None, REMOTE_CLOSED | NO_DATA, self._deadline_s)
            self._state.client_open = False

    def receive(self) -> Optional[M]:
        """Return the server's next message, None after the last.

        Raises:
            RemoraError: the server's error status, or the connection is lost.
        """
        payload = self._client.take(self._state, self._deadline_s)
        return None if payload is None else self._response_cls.decode(payload, limits=self._client.limits)

    def cancel(self) -> None:
        """Give the call up. What the server still sends for it is dropped."""
        self._client.forget(self._state)

    def __iter__(self) -> Iterator[M]:
        while True:
            message = self.receive()
            if message is None:
                return
            yield message
