"""Tenants that send requests with known answers and count what becomes of each: the load under which faults happen.

Frames are made here and not by the SDK, so that an answer that comes twice, late or to nobody is seen. A client keeps
some requests in flight; when its connection ends it comes back with its token and sends what has no answer again, under
the same request ids, as docs/protocol.md says.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from remora.wire import remora_v1
from remora.wire.protobuf import Message
from remora.wire.ttrpc.frames import HEADER
from remora.wire.ttrpc.messages import Request, Response

_REQUEST, _RESPONSE = 1, 2
#: CANCELLED, ABORTED, UNAVAILABLE, RESOURCE_EXHAUSTED: sent again, as the protocol allows.
_AGAIN = (1, 8, 10, 14)
_PAUSE_S = 0.01


@dataclass
class Sent:
    """A request without an answer so far."""

    number: int
    value: float
    began_s: float
    tries: int = 1


@dataclass
class Tally:
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    #: Answers to what was answered before, or never asked.
    twice: int = 0
    resumed: int = 0
    fresh: int = 0
    #: Errors that were not sent again, and how often others were.
    errors: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    #: Answers to requests that had been sent again after an error.
    after_one_retry: int = 0
    after_more: int = 0


class LoadClient:
    """One tenant's connection, in a thread of its own. `model` is in the catalogue, or was uploaded by `prepare`."""

    def __init__(
        self, connect: Callable[[], socket.socket], model: str, *, in_flight: int = 2, upload: bytes = b""
    ) -> None:
        self.tally = Tally()
        self.last_answer_s = 0.0
        #: When the first answer came on the connection that is open now; 0: none so far.
        self.first_answer_s = 0.0
        self._connect = connect
        self._model = model
        self._upload = upload
        self._in_flight = in_flight
        self._token = b""
        self._stop = threading.Event()
        self._pending: dict[int, Sent] = {}  # by request id
        self._numbers = random.Random()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_s: float = 30.0) -> None:
        """Send nothing new, and wait until everything is answered."""
        self._stop.set()
        self._thread.join(timeout_s)

    @property
    def lost(self) -> int:
        """Requests without an answer after `finish`."""
        return len(self._pending)

    # -- the connection -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._stop.is_set() and not self._pending):
            try:
                with self._connect() as sock:
                    sock.settimeout(20)
                    self._serve(sock)
            except (OSError, EOFError):
                time.sleep(_PAUSE_S)  # the agent is gone: it comes back
            except BaseException as error:
                self.failure = error
                raise

    def _serve(self, sock: socket.socket) -> None:
        self._stream = -1
        self._streams: dict[int, int] = {}  # stream -> request id
        self._hello(sock)
        self.first_answer_s = 0.0
        for number in list(self._pending):
            self._send_infer(sock, number)
        while self._pending or not self._stop.is_set():
            while len(self._pending) < self._in_flight and not self._stop.is_set():
                number = self._numbers.getrandbits(63) | 1
                value = struct.unpack("<f", struct.pack("<f", self._numbers.uniform(-1e6, 1e6)))[0]
                self._pending[number] = Sent(number, value, time.monotonic())
                self.tally.sent += 1
                self._send_infer(sock, number)
            self._take(sock)

    def _hello(self, sock: socket.socket) -> None:
        hello = remora_v1.HelloResponse.decode(
            self._ask(sock, "Hello", remora_v1.HelloRequest(version=1, client="load", token=self._token))
        )
        known = bool(self._token)
        self._token = bytes(hello.token)
        if hello.resumed:
            self.tally.resumed += 1
        elif known:
            self.tally.fresh += 1
        if self._upload and not hello.resumed:
            put = remora_v1.PutResourceRequest(
                digest=self._model, offset=0, total_bytes=len(self._upload), data=self._upload
            )
            self._ask(sock, "PutResource", put)
            self._ask(sock, "LoadModel", remora_v1.LoadModelRequest(model=self._model))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _send(self, sock: socket.socket, method: str, message: Message) -> int:
        self._stream += 2
        body = b"".join(Request(service=remora_v1.SERVICE, method=method, payload=b"".join(message.encode())).encode())
        sock.sendall(HEADER.pack(len(body), self._stream, _REQUEST, 0) + body)
        return self._stream

    def _ask(self, sock: socket.socket, method: str, message: Message) -> bytes:
        stream = self._send(sock, method, message)
        found, response = self._receive(sock)
        if found != stream or (response.status is not None and response.status.code):
            raise OSError(f"{method} was answered with {response.status and response.status.message}")
        return bytes(response.payload)

    def _send_infer(self, sock: socket.socket, number: int) -> None:
        data = struct.pack("<f", self._pending[number].value)
        tensor = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 1, 1, 1], data=data)
        stream = self._send(
            sock, "Infer", remora_v1.InferRequest(model=self._model, inputs=[tensor], request_id=number)
        )
        self._streams[stream] = number

    def _take(self, sock: socket.socket) -> None:
        stream, response = self._receive(sock)
        number = self._streams.pop(stream, 0)
        sent = self._pending.get(number)
        if sent is None:
            self.tally.twice += 1
            return
        status = response.status
        if status is not None and status.code in _AGAIN:
            self.tally.again[f"{status.code}: {status.message}"[:120]] += 1
            sent.tries += 1
            time.sleep(_PAUSE_S)
            self._send_infer(sock, number)
            return
        del self._pending[number]
        self.last_answer_s = time.monotonic()
        self.first_answer_s = self.first_answer_s or self.last_answer_s
        self.tally.slowest_s = max(self.tally.slowest_s, self.last_answer_s - sent.began_s)
        if status is not None and status.code:
            self.tally.errors[f"{status.code}: {status.message}"[:200]] += 1
            return
        answer = remora_v1.InferResponse.decode(bytes(response.payload))
        self.tally.answered += 1
        self.tally.after_one_retry += sent.tries == 2
        self.tally.after_more += sent.tries > 2
        self.tally.wrong += bytes(answer.outputs[0].data) != struct.pack("<f", sent.value)

    def _receive(self, sock: socket.socket) -> tuple[int, Response]:
        size, stream, kind, _flags = HEADER.unpack(_exactly(sock, HEADER.size))
        assert kind == _RESPONSE
        return stream, Response.decode(_exactly(sock, size))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
