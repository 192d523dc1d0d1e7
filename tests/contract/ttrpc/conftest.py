"""One service on three servers, two clients behind one face: what the contract tests are run over."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from remora.errors import UnimplementedError, from_code
from remora.reactor import Reactor
from remora.wire.ttrpc import aio, aio_server, sync
from remora.wire.ttrpc import messages as envelopes
from remora.wire.ttrpc.reactor import Call, ServerConnection, listen
from remora.wire.ttrpc.server import Server
from remora.wire.ttrpc.service import Context, Method
from remora.wire.vaccel import ResourceBlob as Item  # a number, a string, an enum, bytes: all that is needed

SERVICE = "test.v1.Contract"
MAX_MESSAGE_BYTES = 1 << 20
DEADLINE_S = 20.0


class State:
    """What the server side saw."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.waiting = threading.Event()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {DEADLINE_S} s"
        threading.Event().wait(0.005)


def failure(item: Item) -> Exception:
    error = from_code(item.type_, item.name)
    error.details = (envelopes.Any(type_url="type.test/detail", value=b"\x10\x5f"),)
    return error


def left_us(deadline_s: float | None) -> int:
    return 0 if deadline_s is None else int((deadline_s - time.monotonic()) * 1e6)


# -- the service, for functions that block ----------------------------------------------------------------------------


def blocking_service(state: State) -> dict[str, dict[str, Method]]:
    def echo(item: Item, _context: Context) -> Item:
        return item

    def fail(item: Item, _context: Context) -> Item:
        raise failure(item)

    def wait(_item: Item, context: Context) -> Item:
        state.waiting.set()
        wait_for(lambda: context.cancelled, "cancellation")
        state.cancelled.set()
        return Item()

    def metadata(item: Item, context: Context) -> Item:
        return Item(name=",".join(context.metadata.get(item.name, [])), size=left_us(context.deadline_s))

    def total(items: Iterator[Item], _context: Context) -> Item:
        return Item(size=sum(item.size for item in items))

    def count(item: Item, _context: Context) -> Iterator[Item]:
        for number in range(item.size):
            yield Item(size=number, data=item.data)
        if item.type_:
            raise failure(item)

    def chat(items: Iterator[Item], _context: Context) -> Iterator[Item]:
        for item in items:
            yield Item(size=item.size + 1, data=item.data)

    return service_of(echo, fail, wait, metadata, total, count, chat)


def service_of(*functions: Callable[..., Any]) -> dict[str, dict[str, Method]]:
    streaming = {"total": (True, False), "count": (False, True), "chat": (True, True)}
    methods = {}
    for function in functions:
        client, server = streaming.get(function.__name__, (False, False))
        name = function.__name__.capitalize()
        methods[name] = Method(Item, Item, function, client_streaming=client, server_streaming=server)
    return {SERVICE: methods}


# -- for asyncio ------------------------------------------------------------------------------------------------------


def async_service(state: State) -> dict[str, dict[str, Method]]:
    async def echo(item: Item, _context: Context) -> Item:
        return item

    async def fail(item: Item, _context: Context) -> Item:
        raise failure(item)

    async def wait(_item: Item, _context: Context) -> Item:
        state.waiting.set()
        try:
            await asyncio.sleep(DEADLINE_S)
        except asyncio.CancelledError:
            state.cancelled.set()
            raise
        return Item()

    async def metadata(item: Item, context: Context) -> Item:
        return Item(name=",".join(context.metadata.get(item.name, [])), size=left_us(context.deadline_s))

    async def total(items: AsyncIterator[Item], _context: Context) -> Item:
        number = 0
        async for item in items:
            number += item.size
        return Item(size=number)

    async def count(item: Item, _context: Context) -> AsyncIterator[Item]:
        for number in range(item.size):
            yield Item(size=number, data=item.data)
        if item.type_:
            raise failure(item)

    async def chat(items: AsyncIterator[Item], _context: Context) -> AsyncIterator[Item]:
        async for item in items:
            yield Item(size=item.size + 1, data=item.data)

    return service_of(echo, fail, wait, metadata, total, count, chat)


# -- for the reactor: calls, answered by callbacks --------------------------------------------------------------------


def reactor_service(state: State) -> Callable[[Call], None]:
    def handle(call: Call) -> None:
        if call.service != SERVICE:
            raise UnimplementedError(f"no service {call.service}")
        if call.method in ("Total", "Chat"):
            stream(call)
            return
        item = Item.decode(call.payload)
        if call.method == "Echo":
            call.respond(item)
        elif call.method == "Fail":
            raise failure(item)
        elif call.method == "Wait":
            call.on_cancel(lambda _reason: state.cancelled.set())
            state.waiting.set()
        elif call.method == "Metadata":
            values = ",".join(call.metadata.get(item.name, []))
            call.respond(Item(name=values, size=left_us(call.deadline_s)))
        elif call.method == "Count":
            for number in range(item.size):
                call.send(Item(size=number, data=item.data))
            if item.type_:
                raise failure(item)
            call.finish()
        else:
            raise UnimplementedError(f"no method {call.method}")

    def stream(call: Call) -> None:
        total = 0

        def take(payload: bytes | memoryview, release: Callable[[], None]) -> None:
            nonlocal total
            item = Item.decode(payload)
            total += item.size
            if call.method == "Chat":
                call.send(Item(size=item.size + 1, data=item.data), on_sent=release)
            else:
                release()

        def end() -> None:
            if call.method == "Chat":
                call.finish()
            else:
                call.respond(Item(size=total))

        if call.payload:
            take(call.payload, lambda: None)
        call.on_message = take
        call.on_half_close = end
        if not call.client_open:
            end()

    return handle


# -- servers ----------------------------------------------------------------------------------------------------------


class ServerAt:
    def __init__(self, path: Path, state: State) -> None:
        self.path = path
        self.state = state

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE_S)
        sock.connect(str(self.path))
        return sock


@contextlib.contextmanager
def threaded_server(sock: socket.socket, state: State) -> Iterator[None]:
    with Server(sock, blocking_service(state), max_message_bytes=MAX_MESSAGE_BYTES):
        yield


@contextlib.contextmanager
def asyncio_server(sock: socket.socket, state: State) -> Iterator[None]:
    with event_loop() as run:
        server = run(
            aio_server.Server.start(sock, async_service(state), max_message_bytes=MAX_MESSAGE_BYTES, max_in_flight=256)
        )
        yield
        run(server.close())


@contextlib.contextmanager
def reactor_server(sock: socket.socket, state: State) -> Iterator[None]:
    reactor = Reactor()
    handler = reactor_service(state)
    listener = listen(
        reactor, sock, lambda sock: ServerConnection(reactor, sock, handler, max_message_bytes=MAX_MESSAGE_BYTES)
    )
    thread = threading.Thread(target=reactor.run)
    thread.start()
    yield
    reactor.post(listener.close)
    reactor.post(reactor.stop)
    thread.join()
    reactor.close()


@contextlib.contextmanager
def event_loop() -> Iterator[Callable[..., Any]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(DEADLINE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.fixture(params=[threaded_server, asyncio_server, reactor_server], ids=["threaded", "asyncio", "reactor"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerAt]:
    path = tmp_path / "s"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(64)
    state = State()
    with request.param(sock, state):
        yield ServerAt(path, state)


# -- clients: both behind the blocking face ---------------------------------------------------------------------------


class AsyncFace:
    """The asyncio client, for callers that block."""

    def __init__(self, run: Callable[..., Any], client: aio.Client) -> None:
        self._run = run
        self._client = client

    @property
    def closed(self) -> bool:
        return self._client.closed

    def call(self, *args: Any, **options: Any) -> Any:
        return self._run(self._client.call(*args, **options))

    def stream(self, *args: Any, **options: Any) -> Any:
        return AsyncStreamFace(self._run, self._run(self._client.stream(*args, **options)))

    def close(self) -> None:
        self._run(self._client.close())


class AsyncStreamFace:
    def __init__(self, run: Callable[..., Any], stream: aio.Stream[Item]) -> None:
        self._run = run
        self._stream = stream

    def send(self, message: Item) -> None:
        self._run(self._stream.send(message))

    def close_send(self) -> None:
        self._run(self._stream.close_send())

    def receive(self) -> Any:
        return self._run(self._stream.receive())


ClientFace = sync.Client | AsyncFace
Connect = Callable[..., ClientFace]


@pytest.fixture(params=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest, server: ServerAt) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:
        if request.param == "asyncio":
            run = stack.enter_context(event_loop())

        def make(**options: Any) -> ClientFace:
            client: ClientFace
            if request.param == "sync":
                client = sync.Client(server.connect(), **options)
            else:
                client = AsyncFace(run, run(aio.Client.connect(server.connect(), **options)))
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(connect: Connect) -> ClientFace:
    return connect()
