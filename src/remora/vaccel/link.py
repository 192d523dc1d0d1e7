"""The connection to a vAccel agent, shared by all sessions of a process.

vAccel's agent answers under one of two service names, by how it was built: the synchronous name is tried first and the
other one on status 3 or 12. Ids live at the agent, so a lost connection is simply made anew; a request that was under
way then is not sent again, because vAccel has no idempotency keys.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading

from remora.client import tracing
from remora.client.address import Address, candidates, parse
from remora.client.transport import no_agent, open_socket
from remora.errors import InvalidArgumentError, RemoraError, UnavailableError, UnimplementedError
from remora.vaccel.errors import from_remote
from remora.wire import vaccel
from remora.wire.ttrpc.sync import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, List, Optional, Tuple, Type, TypeVar

    from remora.wire.protobuf import Message

    M = TypeVar("M", bound=Message)

_CONNECT_TIMEOUT_S = 5.0
_NOT_OFFERED = (3, 12)


def addresses() -> List[Address]:
    """Return where an agent may be: `VACCEL_RPC_ADDRESS` if it is set, else where Remora's SDK looks, too.

    vAccel's agents are also reached by plain TCP on other machines. Remora's own listens on loopback only, but who
    points a vAccel program at such an agent must not need another client.
    """
    text = os.environ.get("VACCEL_RPC_ADDRESS") or os.environ.get("VACCEL_RPC_ADDR") or ""
    if not text:
        return candidates()
    if text.startswith("tcp://"):
        host, _, port = text[len("tcp://") :].rpartition(":")
        if host and port.isdigit() and 0 < int(port) < 1 << 16:
            return [Address("tcp", host.strip("[]"), int(port), "VACCEL_RPC_ADDRESS")]
    return [parse(text, "VACCEL_RPC_ADDRESS")]


def _open(address: Address) -> socket.socket:
    if address.kind != "tcp":
        return open_socket(address, _CONNECT_TIMEOUT_S)
    sock = socket.create_connection((address.host, address.port), _CONNECT_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it a small call takes 82 ms
    sock.settimeout(None)
    return sock


class Link:
    """One connection and the service name that its agent answers to."""

    def __init__(self) -> None:
        tried: List[Tuple[Address, Exception]] = []
        for address in addresses():
            try:
                sock = _open(address)
            except OSError as error:
                tried.append((address, error))
                continue
            self.address = address
            self._client = Client(sock, max_message_bytes=vaccel.MAX_MESSAGE_BYTES)
            self.pid = os.getpid()
            #: Known from the first call that was answered by an operation.
            self.service = ""
            return
        raise no_agent(tried)

    @property
    def usable(self) -> bool:
        return not self._client.closed and self.pid == os.getpid()

    def call(self, method: str, request: Message, response_cls: Type[M]) -> M:
        """Make a call under the name that the agent knows.

        Raises:
            RemoraError: the agent's answer.
        """
        trace = tracing.metadata(None)
        if self.service:
            return self._client.call(self.service, method, request, response_cls, metadata=trace)
        try:
            answer = self._client.call(vaccel.SYNC_SERVICE, method, request, response_cls, metadata=trace)
        except RemoraError as error:
            if error.code not in _NOT_OFFERED or error.details:
                if error.details:
                    self.service = vaccel.SYNC_SERVICE
                raise
            refusal = error
        else:
            self.service = vaccel.SYNC_SERVICE
            return answer
        try:
            answer = self._client.call(vaccel.ASYNC_SERVICE, method, request, response_cls, metadata=trace)
        except (InvalidArgumentError, UnimplementedError) as error:
            if error.details:
                self.service = vaccel.ASYNC_SERVICE
                raise
            raise refusal from error  # no vAccel agent under either name: the first answer says more
        self.service = vaccel.ASYNC_SERVICE
        return answer

    def stream_genop(self, messages: Iterable[vaccel.GenopRequest]) -> vaccel.GenopResponse:
        """Send a Genop in several messages. Only agents under the asynchronous name take it."""
        stream = self._client.stream(
            vaccel.ASYNC_SERVICE,
            "GenopStream",
            None,
            vaccel.GenopResponse,
            client_streaming=True,
            metadata=tracing.metadata(None),
        )
        for message in messages:
            stream.send(message)
        stream.close_send()
        answer = stream.receive()
        if answer is None:
            raise InvalidArgumentError("the agent ended GenopStream without an answer")
        return answer

    def close(self) -> None:
        self._client.close()


_lock = threading.Lock()
_shared: Optional[Link] = None
_over = False


def _current() -> Link:
    global _shared
    with _lock:
        link = _shared
        if _over:  # a session that is collected while the interpreter ends must not connect anew
            raise UnavailableError("the program is ending")
        if link is None or not link.usable:
            # A forked child leaves the parent's connection alone: closing it here would not end it there.
            link = _shared = Link()
        return link


def close() -> None:
    """Close the shared connection."""
    global _shared
    with _lock:
        link, _shared = _shared, None
    if link is not None and link.pid == os.getpid():
        link.close()


def _at_exit() -> None:
    global _over
    close()
    _over = True


atexit.register(_at_exit)


def call(method: str, request: Message, response_cls: Type[M]) -> M:
    """Make a call to the agent.

    Raises:
        FFIError: it failed; `code` is the errno.
    """
    try:
        return _current().call(method, request, response_cls)
    except RemoraError as error:
        raise from_remote(error) from error


def streams() -> bool:
    """True if the agent takes GenopStream: it answers to the asynchronous name."""
    return _current().service == vaccel.ASYNC_SERVICE


def stream_genop(messages: Iterable[vaccel.GenopRequest]) -> vaccel.GenopResponse:
    """Send a Genop in several messages.

    Raises:
        FFIError: it failed.
    """
    try:
        return _current().stream_genop(messages)
    except RemoraError as error:
        raise from_remote(error) from error
