"""`/metrics` and `/healthz`: the smallest HTTP/1.1 server that Prometheus, a kubelet and kube-apiserver can read.

GET only, one request per connection, a few KiB and a few seconds per request. Anything else is answered and closed.
When all connections are taken, the one that has been longest without a whole request, or without reading its answer,
gives way to a new one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from remora.agent.addresses import means_this_machine
from remora.reactor import READ, WRITE, Reactor

MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 16
TIMEOUT_S = 5.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Too Large",
    500: "Internal Server Error",
}
_TEXT = "text/plain; charset=utf-8"

#: Status, content type and body.
Response = tuple[int, str, bytes]
Page = Callable[[], Response]
#: Answers a request's target (with its query): calls the second argument once, now or later, in the loop's thread.
Answer = Callable[[str, Callable[[Response], None]], None]


def respond(request: bytes, pages: Mapping[str, Page], *, local: bool = False) -> bytes:
    """Return the whole response to a request's head."""
    target = target_of(request, MAX_REQUEST_BYTES, local=local)
    return encoded(page(target, pages) if isinstance(target, str) else target)


def target_of(request: bytes, most_bytes: int, *, local: bool = False) -> str | Response:
    """Return what a request's head asks for, or what it is refused with.

    Args:
        local: It came to a loopback address, which no web page may read through a browser.
    """
    line, _, headers = request.partition(b"\n")
    parts = line.removesuffix(b"\r").split(b" ")
    if len(request) >= most_bytes:
        return 431, _TEXT, b"the request is too large\n"
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
        return 400, _TEXT, b"bad request\n"
    if parts[0] != b"GET":
        return 405, _TEXT, b"only GET is allowed\n"
    if local and not all(map(means_this_machine, _hosts(headers))):
        return 403, _TEXT, b"this address has no name but localhost\n"
    return parts[1].decode("latin-1")


def _hosts(headers: bytes) -> list[str]:
    lines = (line.partition(b":") for line in headers.split(b"\n"))
    return [value.strip().decode("latin-1") for name, _, value in lines if name.strip().lower() == b"host"]


def page(target: str, pages: Mapping[str, Page]) -> Response:
    found = pages.get(target.partition("?")[0])
    if found is None:
        return 404, _TEXT, b"the pages are " + ", ".join(sorted(pages)).encode() + b"\n"
    return found()


def encoded(response: Response) -> bytes:
    status, kind, body = response
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Service Unavailable')}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class _Connection:
    def __init__(self, server: HttpServer, sock: socket.socket, local: bool) -> None:
        self._server = server
        self._local = local
        self._sock = sock
        self._request = b""
        self._response = memoryview(b"")
        #: A whole request has come.
        self.asked = False
        self._closed = False
        self._timer = server.reactor.call_later(TIMEOUT_S, self.close)
        server.reactor.register(sock.fileno(), READ, self._ready)

    def _ready(self, _events: int) -> None:
        try:
            if self._response:
                self._send()
            elif self.asked:
                self.close()  # the peer went away before its answer
            else:
                self._receive()
        except BlockingIOError:
            return
        except OSError:
            self.close()

    @property
    def sending(self) -> bool:
        """True if it has its answer, which it has not read to the end."""
        return bool(self._response)

    def _receive(self) -> None:
        data = self._sock.recv(MAX_REQUEST_BYTES)
        self._request += data
        ended = b"\r\n\r\n" in self._request or b"\n\n" in self._request
        if ended or len(self._request) >= self._server.most_bytes:
            target = target_of(self._request, self._server.most_bytes, local=self._local)
            self.asked = True
            self._server.reactor.modify(self._sock.fileno(), 0)  # its end is reported all the same
            if isinstance(target, str):
                self._server.answer(target, self._respond)
            else:
                self._respond(target)
        elif not data:
            self.close()

    def _respond(self, response: Response) -> None:
        if self._closed:
            return
        self._response = memoryview(encoded(response))
        self._server.reactor.modify(self._sock.fileno(), WRITE)

    def _send(self) -> None:
        self._response = self._response[self._sock.send(self._response) :]
        if not self._response:
            self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._server.reactor.unregister(self._sock.fileno())
        self._sock.close()
        self._server.connections.pop(self, None)


class HttpServer:
    """Answers requests on connections."""

    def __init__(
        self,
        reactor: Reactor,
        answer: Answer,
        *,
        most_bytes: int = MAX_REQUEST_BYTES,
        most_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.reactor = reactor
        self.answer = answer
        self.most_bytes = most_bytes
        self._most_connections = most_connections
        #: The oldest first.
        self.connections: dict[_Connection, None] = {}

    @classmethod
    def of_pages(cls, reactor: Reactor, pages: Mapping[str, Page]) -> HttpServer:
        return cls(reactor, lambda target, done: done(page(target, pages)))

    def serve(self, sock: socket.socket, *, local: bool = False) -> None:
        """Take over a connection; `local`: as in `target_of`."""
        if len(self.connections) >= self._most_connections:
            slow = next((one for one in self.connections if not one.asked or one.sending), None)
            if slow is None:
                sock.close()
                return
            slow.close()
        sock.setblocking(False)
        self.connections[_Connection(self, sock, local)] = None

    def close(self) -> None:
        for connection in list(self.connections):
            connection.close()
