"""A fake node agent for tests of clients: speaks remora.v1, computes nothing, and fails on command.

It keeps sessions, answers and resources as docs/protocol.md says, so that a client that resumes wrongly is caught, and
it can drop connections at chosen moments, forget, answer late or never, and cut an answer in two. It reads and writes
frames by hand, because a real server would not do most of that.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from remora.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError, RemoraError
from remora.wire import remora_v1 as v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.core import error_frame, response_frame
from remora.wire.ttrpc.messages import Request

WAIT_S = 20.0

Action = Callable[["FakeConnection", Callable[[], bytes]], None]


def drop(connection: FakeConnection, _run: Callable[[], bytes]) -> None:
    """The connection ends before the operation runs."""
    connection.close()


def drop_after(connection: FakeConnection, run: Callable[[], bytes]) -> None:
    """The operation runs, and the connection ends before its answer."""
    run()
    connection.close()


def truncate(connection: FakeConnection, run: Callable[[], bytes]) -> None:
    """The answer is cut in two, and the connection ends between the halves."""
    answer = run()
    connection.send(answer[: len(answer) // 2])
    connection.close()


def silence(_connection: FakeConnection, _run: Callable[[], bytes]) -> None:
    """No answer, ever."""


def garbage(connection: FakeConnection, run: Callable[[], bytes]) -> None:
    """An answer that is no protobuf."""
    answer = run()
    connection.send(answer[:10] + b"\xff" * (len(answer) - 10))


def fail(error: RemoraError) -> Action:
    """The agent answers with an error and does not run the operation."""

    def action(connection: FakeConnection, _run: Callable[[], bytes]) -> None:
        connection.send(b"".join(error_frame(connection.stream_id, error)))

    return action


class Gate:
    """Holds requests until the test opens it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting = 0
        self._open = False

    def __call__(self, connection: FakeConnection, run: Callable[[], bytes]) -> None:
        def held() -> None:
            with self._condition:
                self._waiting += 1
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._open, WAIT_S)
            connection.send(run())

        connection.agent.spawn(held)

    def wait_for(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._waiting >= count, WAIT_S), f"{self._waiting} of {count} came"

    def open(self) -> None:
        with self._condition:
            self._open = True
            self._condition.notify_all()


class FakeSession:
    def __init__(self, number: int) -> None:
        self.id = f"session-{number}"
        self.token = os.urandom(16)
        self.models: set[str] = set()
        self.answers: dict[int, Message] = {}


class FakeConnection:
    def __init__(self, agent: FakeAgent, sock: socket.socket, number: int) -> None:
        self.agent = agent
        self.number = number
        self.sock = sock
        self.session: FakeSession | None = None
        self.stream_id = 0
        self._send_lock = threading.Lock()

    def serve(self) -> None:
        with self.sock:
            try:
                while (header := self._read(10)) is not None:
                    length, self.stream_id = struct.unpack(">II", header[:8])
                    body = self._read(length)
                    if body is None:
                        return
                    self.agent.handle(self, self.stream_id, Request.decode(bytes(body)))
            except OSError:
                pass  # closed by the test, or the client is gone

    def send(self, data: bytes) -> None:
        try:
            with self._send_lock:
                self.sock.sendall(data)
        except OSError:
            pass  # as above

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already

    def _read(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self.sock.recv_into(view[got:])
            if not count:
                return None
            got += count
        return data


class FakeAgent:
    """Use as a context manager: it listens from the start and has joined its threads at the end."""

    def __init__(self, path: Path, *, max_message_bytes: int = 16 << 20) -> None:
        self.path = path
        self.address = f"unix://{path}"
        self.max_message_bytes = max_message_bytes
        self.sessions: dict[bytes, FakeSession] = {}
        self.resources: dict[str, bytearray] = {}
        self.complete: set[str] = set()
        #: A token of another sandbox's session -> it may be forked by whoever presents it.
        self.parents: dict[bytes, FakeSession] = {}
        self.catalogue = {"efficientnet-lite0", "identity"}
        self.calls: list[tuple[int, str, Any]] = []
        #: (session, request id) -> how often the operation ran.
        self.runs: Counter[tuple[str, int]] = Counter()
        self.connections: list[FakeConnection] = []
        self._plans: dict[str, deque[Action | None]] = defaultdict(deque)
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._stack = ExitStack()
        self.start()

    def __enter__(self) -> FakeAgent:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    # -- what tests say ---------------------------------------------------------------------------------------------

    def plan(self, method: str, *actions: Action | None) -> None:
        """The next calls of `method` meet these actions, one each; None answers as usual."""
        with self._lock:
            self._plans[method].extend(actions)

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(128)
        self.spawn(self._accept)

    def stop(self) -> None:
        """As SIGKILL would: all connections end, the socket file stays."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.drop_connections()
        while self._threads:
            thread = self._threads.pop()
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def drop_connections(self) -> None:
        with self._lock:
            for connection in self.connections:
                connection.close()

    def forget_sessions(self) -> None:
        with self._lock:
            self.sessions.clear()

    def forget_resources(self) -> None:
        with self._lock:
            self.resources.clear()
            self.complete.clear()

    def called(self, method: str) -> list[Any]:
        with self._lock:
            return [request for _connection, name, request in self.calls if name == method]

    def spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    # -- what it does -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is None:
                    sock.close()
                    return
                connection = FakeConnection(self, sock, len(self.connections))
                self.connections.append(connection)
            self.spawn(connection.serve)

    def handle(self, connection: FakeConnection, stream_id: int, request: Request) -> None:
        assert request.service == v1.SERVICE
        message = v1.METHODS[request.method][0].decode(bytes(request.payload))
        with self._lock:
            self.calls.append((connection.number, request.method, message))
            plan = self._plans[request.method]
            action = plan.popleft() if plan else None

        def run() -> bytes:
            with self._lock:
                try:
                    return b"".join(response_frame(stream_id, self._answer(connection, request.method, message)))
                except RemoraError as error:
                    return b"".join(error_frame(stream_id, error))

        if action is None:
            connection.send(run())
        else:
            action(connection, run)

    def _answer(self, connection: FakeConnection, method: str, request: Any) -> Message:
        if method == "Hello":
            return self._hello(connection, request)
        session = connection.session
        if session is None:
            raise FailedPreconditionError(f"{method} before Hello")
        request_id = getattr(request, "request_id", 0)
        if request_id and request_id in session.answers:
            return session.answers[request_id]
        if request_id:
            self.runs[session.id, request_id] += 1
        answer: Message = getattr(self, f"_{method.lower()}")(session, request)
        if request_id:
            session.answers[request_id] = answer
        return answer

    def _hello(self, connection: FakeConnection, request: v1.HelloRequest) -> Message:
        token = bytes(request.token)
        resumed, forked = token in self.sessions, token in self.parents
        if resumed:
            session = self.sessions[token]
        else:
            session = FakeSession(connection.number)
            self.sessions[session.token] = session
            if forked:
                session.models |= self.parents[token].models
        connection.session = session
        return v1.HelloResponse(
            session_id=session.id,
            token=session.token,
            resumed=resumed,
            forked=forked,
            lease_s=60,
            max_message_bytes=self.max_message_bytes,
            operations=["classify", "infer"],
            agent="fake/1",
            version=1,
        )

    def _close(self, session: FakeSession, _request: v1.Empty) -> Message:
        self.sessions.pop(session.token, None)
        return v1.Empty()

    def _noop(self, _session: FakeSession, request: v1.NoopRequest) -> Message:
        return v1.NoopResponse(data=request.data)

    def _models(self, session: FakeSession, _request: v1.Empty) -> Message:
        return v1.ModelsResponse(models=[_info(name) for name in sorted(self.catalogue | session.models)])

    def _statresource(self, _session: FakeSession, request: v1.StatResourceRequest) -> Message:
        received = len(self.resources.get(request.digest, b""))
        return v1.StatResourceResponse(complete=request.digest in self.complete, received_bytes=received)

    def _putresource(self, _session: FakeSession, request: v1.PutResourceRequest) -> Message:
        stored = self.resources.setdefault(request.digest, bytearray())
        if request.offset > len(stored):
            raise FailedPreconditionError(f"a gap: {request.offset} > {len(stored)}")
        stored += request.data[len(stored) - request.offset :]
        if len(stored) == request.total_bytes:
            if "sha256:" + hashlib.sha256(stored).hexdigest() != request.digest:
                del self.resources[request.digest]
                raise DataLossError("these bytes have another digest")
            self.complete.add(request.digest)
        return v1.PutResourceResponse(received_bytes=len(stored), complete=request.digest in self.complete)

    def _loadmodel(self, session: FakeSession, request: v1.LoadModelRequest) -> Message:
        if request.model not in self.catalogue | self.complete:
            raise NotFoundError(f"no model {request.model!r}")
        session.models.add(request.model)
        return v1.LoadModelResponse(model=_info(request.model))

    def _unloadmodel(self, session: FakeSession, request: v1.UnloadModelRequest) -> Message:
        session.models.discard(request.model)
        return v1.Empty()

    def _infer(self, session: FakeSession, request: v1.InferRequest) -> Message:
        self._check_model(session, request.model)
        wanted = request.outputs or [tensor.name for tensor in request.inputs]
        found = {tensor.name: tensor for tensor in request.inputs}
        if unknown := set(wanted) - set(found):
            raise InvalidArgumentError(f"the model has no output {unknown}")
        return v1.InferResponse(outputs=[found[name] for name in wanted], timing=v1.Timing(run_us=1))

    def _classify(self, session: FakeSession, request: v1.ClassifyRequest) -> Message:
        self._check_model(session, request.model)
        name = hashlib.sha256(request.image).hexdigest()[:8]
        labels = [v1.Label(index=i, name=f"{name}-{i}", score=1 / (i + 1)) for i in range(request.top or 5)]
        return v1.ClassifyResponse(labels=labels)

    def _check_model(self, session: FakeSession, name: str) -> None:
        if name not in self.catalogue | session.models:
            raise NotFoundError(f"no model {name!r}")


def _info(name: str) -> v1.ModelInfo:
    spec = v1.TensorSpec(name="x", dtype="float32", shape=[-1, 4])
    return v1.ModelInfo(name=name, task="tensor", inputs=[spec], outputs=[spec], licence="Apache-2.0")
