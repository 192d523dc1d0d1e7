"""A session's way to the agent, kept up over lost connections; many threads call through it at once.

One connection carries all calls; the ttrpc client below pipelines them. When the connection is lost, the first thread
that notices makes a new one while the others wait for it, each no longer than its own deadline; then each sends its own
unanswered request again. Whoever forks gets a link of its own in the child: two processes that read from one socket
would steal each other's answers.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque

from remora.client import transport
from remora.client.address import Address
from remora.client.continuity import (
    CLOSE_TIMEOUT_S,
    HELLO_TIMEOUT_S,
    MAX_ANSWER_BYTES,
    MAX_FIRST_DROPS,
    PROBE_TIMEOUT_S,
    UPLOAD_WINDOW,
    Continuity,
    Patience,
)
from remora.client.health import Health
from remora.client.inference import InferAnswer, Inference
from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    ProtocolError,
    RemoraError,
    UnavailableError,
)
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.sync import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Type, TypeVar

    from remora.client.region import Region
    from remora.wire.ttrpc.core import Body, Metadata
    from remora.wire.ttrpc.sync import Stream

    Response = TypeVar("Response", bound=Message)


class Connection(Health):
    """One socket to the agent, and what is known of its health."""

    __slots__ = ("sock",)
    client: Client

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(Client(sock, max_message_bytes=MAX_ANSWER_BYTES))
        self.sock = sock


class Link:
    """Calls methods of `remora.v1.Accelerator`, reconnecting and resending as needed. Thread-safe.

    Args:
        addresses: Where to look for an agent, best first. The one that answered first is kept.
        reconnect_s: How long a lost connection is sought before calls fail.
    """

    def __init__(self, addresses: Sequence[Address], continuity: Continuity, *, reconnect_s: float) -> None:
        self._addresses = list(addresses)
        self.continuity = continuity
        self._reconnect_s = reconnect_s
        self._connection: Optional[Connection] = None
        self._closed = False
        self._renew_locks()
        _links.add(self)

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()  # held while a connection is being made
        self._closing = threading.Event()

    @property
    def address(self) -> Address:
        return self._addresses[0]

    def open(self, timeout_s: float) -> None:
        """Make the first connection.

        Raises:
            UnavailableError: no agent at any of the addresses.
        """
        patience = Patience("connect", timeout_s=timeout_s, reconnect_s=timeout_s, now_s=time.monotonic())
        with self._lock:
            self._connect_first(patience)

    def call(
        self,
        method: str,
        request: Message,
        response: Type[Response],
        *,
        timeout_s: float,
        metadata: Optional[Metadata] = None,
    ) -> Response:
        """Call one method; the request may be sent several times, so it must be idempotent or carry a request id.

        Raises:
            RemoraError: the agent's answer, or UnavailableError or DeadlineExceededError from here.
        """
        return self._call(method, lambda _connection: request, response, timeout_s, metadata)

    def infer(
        self,
        request: Inference,
        arrays: Optional[bool],
        *,
        timeout_s: float,
        metadata: Optional[Metadata] = None,
    ) -> Dict[str, Any]:
        """Make an Infer call, with the tensors in shared memory where the agent has offered some; return the results.

        Raises:
            RemoraError: as `call`.
        """
        with_region = True

        def body(connection: Connection) -> Body:
            message = request.body(self._region(connection, request) if with_region else None)
            if isinstance(message, Message):
                self.continuity.check_size(message.byte_size(), "Infer")
            return message

        try:
            try:
                answer = self._call("Infer", body, InferAnswer, timeout_s, metadata)
            except FailedPreconditionError as error:
                if not request.is_shared:
                    raise
                request.failed(error)  # it may be the memory that the agent knows no more
                with_region = False
                answer = self._call("Infer", body, InferAnswer, timeout_s, metadata)
        except BaseException as error:
            request.failed(error)
            raise
        return request.answered(answer, arrays)

    def _region(self, connection: Connection, request: Inference) -> Optional[Region]:
        size_bytes = request.shared_bytes
        if not size_bytes or not self.continuity.share_bytes:
            return None
        wanted = connection.wanted_bytes(size_bytes, self.continuity.share_bytes)
        if wanted:
            from remora.client import region as regions

            try:
                connection.region = regions.share(self.address, self.continuity.token, wanted, HELLO_TIMEOUT_S)
            except RemoraError:
                return None
        return connection.region

    def _call(
        self,
        method: str,
        body: Callable[[Connection], Body],
        response: Type[Response],
        timeout_s: float,
        metadata: Optional[Metadata],
    ) -> Response:
        patience = Patience(method, timeout_s=timeout_s, reconnect_s=self._reconnect_s, now_s=time.monotonic())
        while True:
            connection = self._connected(patience)
            request = body(connection)
            try:
                return connection.client.call(
                    v1.SERVICE,
                    method,
                    request,
                    response,
                    timeout_s=patience.left_s(time.monotonic()),
                    metadata=metadata,
                )
            except UnavailableError as error:
                judge = patience.cut if connection.client.closed else patience.refused
                self._closing.wait(judge(error, time.monotonic()))
            except DeadlineExceededError:
                connection.suspect = True
                raise
            except ProtocolError:
                self._drop(connection)
                raise
            except RemoraError:
                raise
            except BaseException:
                # Ctrl-C in the middle of a frame: half of it may be on its way. A new connection is cheap, and other
                # threads send again what they had under way.
                self._drop(connection)
                raise

    def call_each(
        self, method: str, requests: Iterable[Message], response: Type[Response], *, timeout_s: float
    ) -> Iterator[Response]:
        """Send requests in order on one connection, several under way at once; yield the answers in order.

        Raises:
            RemoraError: the first error. An UnavailableError may mean that the connection is gone: nothing is sent
                again here, since what comes next depends on how far the agent came.
        """
        patience = Patience(method, timeout_s=timeout_s, reconnect_s=self._reconnect_s, now_s=time.monotonic())
        connection = self._connected(patience)
        under_way: Deque[Stream[Response]] = deque()
        try:
            for request in requests:
                under_way.append(connection.client.stream(v1.SERVICE, method, request, response, timeout_s=timeout_s))
                if len(under_way) >= UPLOAD_WINDOW:
                    yield _answer(under_way)
            while under_way:
                yield _answer(under_way)
        except (RemoraError, GeneratorExit):
            raise
        except BaseException:
            self._drop(connection)  # as in `call`
            raise
        finally:
            for stream in under_way:
                stream.cancel()

    def close(self) -> None:
        """End the session at the agent, as far as it can be reached, and close the socket. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if connection.is_usable() and not connection.suspect:
                connection.client.call(v1.SERVICE, "Close", v1.Empty(), v1.Empty, timeout_s=CLOSE_TIMEOUT_S)
        except RemoraError:
            pass  # an agent that is gone has no session of ours to keep
        finally:
            connection.client.close()

    # -- connections ------------------------------------------------------------------------------------------------

    def _connected(self, patience: Patience) -> Connection:
        connection = self._connection
        if connection is not None and not connection.suspect and connection.is_usable():
            return connection
        if not self._lock.acquire(timeout=patience.left_s(time.monotonic())):
            raise patience.too_late()
        try:
            return self._reconnect(patience)
        finally:
            self._lock.release()

    def _reconnect(self, patience: Patience) -> Connection:
        while True:
            if self._closed:
                raise FailedPreconditionError("the session is closed", fix="open another one with remora.connect()")
            connection = self._connection
            if connection is not None:
                if connection.is_usable() and (not connection.suspect or self._answers(connection, patience)):
                    patience.back()
                    return connection
                self._drop(connection)
            try:
                self._connection = self._greet(self.address, patience)
            except UnavailableError as error:
                self._closing.wait(patience.lost(error, time.monotonic()))

    def _connect_first(self, patience: Patience) -> None:
        drops = 0
        while True:
            tried: List[Tuple[Address, Exception]] = []
            for address in self._addresses:
                try:
                    self._connection = self._greet(address, patience)
                except NobodyThereError as error:
                    tried.append((address, error.reason))
                except UnavailableError as error:
                    drops += 1
                    if drops >= MAX_FIRST_DROPS:
                        raise
                    self._closing.wait(patience.lost(error, time.monotonic()))
                    break
                else:
                    self._addresses = [address]
                    return
            else:
                raise transport.no_agent(tried) from tried[-1][1]

    def _greet(self, address: Address, patience: Patience) -> Connection:
        """Connect and open or resume the session.

        Raises:
            UnavailableError: nobody is there, or whoever is there went away or is silent.
        """
        timeout_s = min(patience.left_s(time.monotonic()), HELLO_TIMEOUT_S)
        try:
            sock = transport.open_socket(address, timeout_s)
        except OSError as error:
            raise NobodyThereError(address, error) from error
        connection = Connection(sock)
        try:
            answer = connection.client.call(
                v1.SERVICE, "Hello", self.continuity.hello(), v1.HelloResponse, timeout_s=timeout_s
            )
        except DeadlineExceededError as error:
            connection.client.close()
            raise transport.silent(address, timeout_s) from error
        except UnavailableError as error:
            connection.client.close()
            raise transport.refusal(sock) or error from error
        except BaseException:
            connection.client.close()
            raise
        self.continuity.greeted(answer)
        return connection

    def _answers(self, connection: Connection, patience: Patience) -> bool:
        timeout_s = min(patience.left_s(time.monotonic()), PROBE_TIMEOUT_S)
        try:
            connection.client.call(v1.SERVICE, "Noop", v1.NoopRequest(), v1.NoopResponse, timeout_s=timeout_s)
        except RemoraError:
            return False
        connection.suspect = False
        return True

    def _drop(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        connection.client.close()

    def _after_fork(self) -> None:
        """In the child: leave the parent's connection and session alone, and start anew with the next call."""
        connection, self._connection = self._connection, None
        self._renew_locks()
        if connection is not None:
            connection.sock.close()  # only this process's descriptor: a shutdown would end the parent's connection
        self.continuity.forget()


def _answer(under_way: Deque[Stream[Response]]) -> Response:
    stream = under_way.popleft()
    answer = stream.receive()
    if answer is None:
        raise ProtocolError("the agent ended a call without an answer")
    return answer


class NobodyThereError(UnavailableError):
    """No agent listens at an address; `reason` is the system's."""

    def __init__(self, address: Address, reason: Exception) -> None:
        error = transport.no_agent([(address, reason)])
        super().__init__(error.message, fix=error.fix)
        self.reason = reason


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _renew_links() -> None:
    for link in list(_links):
        link._after_fork()


os.register_at_fork(after_in_child=_renew_links)
