"""The asyncio twin of `link`: a session's way to the agent, kept up over lost connections, for many tasks at once.

The decisions are `continuity`'s, as there. What differs is who makes a new connection: a task of its own for which
the callers wait. A caller that is cancelled or runs out of time then takes nothing with it that others wait for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque

from remora.client import transport
from remora.client.continuity import (
    CLOSE_TIMEOUT_S,
    HELLO_TIMEOUT_S,
    MAX_ANSWER_BYTES,
    MAX_FIRST_DROPS,
    PROBE_TIMEOUT_S,
    UPLOAD_WINDOW,
    Patience,
)
from remora.client.health import Health
from remora.client.inference import InferAnswer, Inference
from remora.client.link import NobodyThereError
from remora.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    ProtocolError,
    RemoraError,
    UnavailableError,
)
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.aio import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import (
        Any,
        AsyncGenerator,
        Awaitable,
        Callable,
        Deque,
        Dict,
        Iterable,
        List,
        Optional,
        Sequence,
        Tuple,
        Type,
        TypeVar,
    )

    from remora.client.address import Address
    from remora.client.continuity import Continuity
    from remora.client.region import Region
    from remora.wire.ttrpc.core import Body, Metadata

    Response = TypeVar("Response", bound=Message)


class Connection(Health):
    """One socket to the agent, and what is known of its health."""

    __slots__ = ()
    client: Client


class AsyncLink:
    """Calls methods of `remora.v1.Accelerator`, reconnecting and resending as needed. Belongs to one event loop."""

    def __init__(self, addresses: Sequence[Address], continuity: Continuity, *, reconnect_s: float) -> None:
        self._addresses = list(addresses)
        self.continuity = continuity
        self._reconnect_s = reconnect_s
        self._connection: Optional[Connection] = None
        self._mending: Optional[asyncio.Task[None]] = None
        self._closed = False
        self._pid = os.getpid()
        #: Why the connection could not be made so far, for callers whose time ends first.
        self._last_error: Optional[RemoraError] = None

    @property
    def address(self) -> Address:
        return self._addresses[0]

    async def open(self, timeout_s: float) -> None:
        """Make the first connection; errors as `Link.open`."""
        patience = Patience("connect", timeout_s=timeout_s, reconnect_s=timeout_s, now_s=time.monotonic())
        drops = 0
        while True:
            tried: List[Tuple[Address, Exception]] = []
            for address in self._addresses:
                try:
                    self._connection = await self._greet(address, patience)
                except NobodyThereError as error:
                    tried.append((address, error.reason))
                except UnavailableError as error:
                    drops += 1
                    if drops >= MAX_FIRST_DROPS:
                        raise
                    await asyncio.sleep(patience.lost(error, time.monotonic()))
                    break
                else:
                    self._addresses = [address]
                    return
            else:
                raise transport.no_agent(tried) from tried[-1][1]

    async def call(
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

        async def body(_connection: Connection) -> Body:
            return request

        return await self._call(method, body, response, timeout_s, metadata)

    async def infer(
        self,
        request: Inference,
        arrays: Optional[bool],
        *,
        timeout_s: float,
        metadata: Optional[Metadata] = None,
    ) -> Dict[str, Any]:
        """Make an Infer call, as `Link.infer`."""
        with_region = True

        async def body(connection: Connection) -> Body:
            message = request.body(await self._region(connection, request) if with_region else None)
            if isinstance(message, Message):
                self.continuity.check_size(message.byte_size(), "Infer")
            return message

        try:
            try:
                answer = await self._call("Infer", body, InferAnswer, timeout_s, metadata)
            except FailedPreconditionError as error:
                if not request.is_shared:
                    raise
                request.failed(error)  # it may be the memory that the agent knows no more
                with_region = False
                answer = await self._call("Infer", body, InferAnswer, timeout_s, metadata)
        except BaseException as error:
            request.failed(error)
            raise
        return request.answered(answer, arrays)

    async def _region(self, connection: Connection, request: Inference) -> Optional[Region]:
        size_bytes = request.shared_bytes
        if not size_bytes or not self.continuity.share_bytes:
            return None
        wanted = connection.wanted_bytes(size_bytes, self.continuity.share_bytes)
        if wanted:
            from remora.client import region as regions

            sharing = asyncio.get_running_loop().run_in_executor(
                None, regions.share, self.address, self.continuity.token, wanted, HELLO_TIMEOUT_S
            )
            try:
                connection.region = await sharing
            except RemoraError:
                return None
        return connection.region

    async def _call(
        self,
        method: str,
        body: Callable[[Connection], Awaitable[Body]],
        response: Type[Response],
        timeout_s: float,
        metadata: Optional[Metadata],
    ) -> Response:
        patience = Patience(method, timeout_s=timeout_s, reconnect_s=self._reconnect_s, now_s=time.monotonic())
        while True:
            connection = await self._connected(patience)
            request = await body(connection)
            try:
                return await connection.client.call(
                    v1.SERVICE,
                    method,
                    request,
                    response,
                    timeout_s=patience.left_s(time.monotonic()),
                    metadata=metadata,
                )
            except UnavailableError as error:
                judge = patience.cut if connection.client.closed else patience.refused
                await asyncio.sleep(judge(error, time.monotonic()))
            except DeadlineExceededError:
                connection.suspect = True
                raise
            except ProtocolError:
                await self._drop(connection)
                raise

    async def call_each(
        self, method: str, requests: Iterable[Message], response: Type[Response], *, timeout_s: float
    ) -> AsyncGenerator[Response, None]:
        """Send requests in order on one connection, several under way at once; yield the answers in order.

        Nothing is sent again here, as in `Link.call_each`. Close the iterator if it is not read to its end.
        """
        patience = Patience(method, timeout_s=timeout_s, reconnect_s=self._reconnect_s, now_s=time.monotonic())
        connection = await self._connected(patience)
        under_way: Deque[asyncio.Task[Response]] = deque()
        try:
            for request in requests:
                # Tasks begin in the order in which they were made, and so do their sends.
                call = connection.client.call(v1.SERVICE, method, request, response, timeout_s=timeout_s)
                under_way.append(asyncio.ensure_future(call))
                if len(under_way) >= UPLOAD_WINDOW:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def close(self) -> None:
        """End the session at the agent, as far as it can be reached, and close the socket. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if connection.is_usable() and not connection.suspect:
                await connection.client.call(v1.SERVICE, "Close", v1.Empty(), v1.Empty, timeout_s=CLOSE_TIMEOUT_S)
        except RemoraError:
            pass  # an agent that is gone has no session of ours to keep
        finally:
            await connection.client.close()

    # -- connections ------------------------------------------------------------------------------------------------

    async def _connected(self, patience: Patience) -> Connection:
        if os.getpid() != self._pid:
            raise FailedPreconditionError(
                "this session belongs to the process that forked this one, and so does its event loop",
                fix="open a session of its own in the child: remora.aio.connect()",
            )
        while True:
            if self._closed:
                raise FailedPreconditionError("the session is closed", fix="open another one with remora.aio.connect()")
            connection = self._connection
            if connection is not None and not connection.suspect and connection.is_usable():
                patience.back()
                return connection
            if self._mending is None or self._mending.done():
                self._mending = asyncio.ensure_future(self._mend())
                self._mending.add_done_callback(_see_error)
            task = self._mending
            await asyncio.wait({task}, timeout=patience.left_s(time.monotonic()))
            if not task.done():
                raise patience.too_late(self._last_error)
            if not task.cancelled():
                error = task.exception()
                if isinstance(error, RemoraError):
                    raise type(error)(error.message, fix=error.fix) from error
                if error is not None:
                    raise error

    async def _mend(self) -> None:
        """Make the connection usable: see whether it lives, or make a new one."""
        patience = Patience("reconnect", timeout_s=float("inf"), reconnect_s=self._reconnect_s, now_s=time.monotonic())
        while True:
            connection = self._connection
            if connection is not None:
                if connection.is_usable() and (not connection.suspect or await self._answers(connection)):
                    return
                await self._drop(connection)
            try:
                self._connection = await self._greet(self.address, patience)
                return
            except UnavailableError as error:
                self._last_error = error
                await asyncio.sleep(patience.lost(error, time.monotonic()))

    async def _greet(self, address: Address, patience: Patience) -> Connection:
        timeout_s = min(patience.left_s(time.monotonic()), HELLO_TIMEOUT_S)
        try:
            sock = await _open_socket(address, timeout_s)
        except OSError as error:
            raise NobodyThereError(address, error) from error
        client = await Client.connect(sock, max_message_bytes=MAX_ANSWER_BYTES)
        connection = Connection(client)
        try:
            answer = await client.call(
                v1.SERVICE, "Hello", self.continuity.hello(), v1.HelloResponse, timeout_s=timeout_s
            )
        except DeadlineExceededError as error:
            await client.close()
            raise transport.silent(address, timeout_s) from error
        except UnavailableError as error:
            await client.close()
            told = await asyncio.get_running_loop().run_in_executor(None, transport.refusal, sock)
            raise told or error from error
        except BaseException:
            await client.close()
            raise
        self.continuity.greeted(answer)
        return connection

    async def _answers(self, connection: Connection) -> bool:
        try:
            await connection.client.call(
                v1.SERVICE, "Noop", v1.NoopRequest(), v1.NoopResponse, timeout_s=PROBE_TIMEOUT_S
            )
        except RemoraError:
            return False
        connection.suspect = False
        return True

    async def _drop(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        await connection.client.close()


async def _open_socket(address: Address, timeout_s: float) -> socket.socket:
    """Return a connected socket; errors as `transport.open_socket`."""
    if address.kind == "tls":
        return await asyncio.get_running_loop().run_in_executor(None, transport.open_socket, address, timeout_s)
    sock = transport.new_socket(address)
    try:
        sock.setblocking(False)
        connecting = asyncio.get_running_loop().sock_connect(sock, transport.plan(address)[1])
        await asyncio.wait_for(connecting, timeout_s)
        return sock
    except asyncio.TimeoutError as error:  # another class than TimeoutError before Python 3.11
        sock.close()
        raise TimeoutError("no answer in time") from error
    except BaseException:
        sock.close()
        raise


def _see_error(task: asyncio.Task[None]) -> None:
    # Whoever waited has seen it; if nobody did, the next call tries again and tells.
    if not task.cancelled():
        task.exception()
