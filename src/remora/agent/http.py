"""`/metrics` and `/healthz`: the smallest HTTP/1.1 server that Prometheus and a kubelet can read, on the reactor.

GET only, one request per connection, a few KiB and a few seconds per request. Anything else is answered and closed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from remora.reactor import READ, WRITE, Reactor

MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 16
TIMEOUT_S = 5.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 431: "Request Too Large"}

#: Returns status, content type and body.
Page = Callable[[], tuple[int, str, bytes]]


def respond(request: bytes, pages: Mapping[str, Page]) -> bytes:
    """Return the whole response to a request's head."""
    line = request.split(b"\r\n", 1)[0].split(b"\n", 1)[0]
    parts = line.split(b" ")
    status, kind, body = 400, "text/plain; charset=utf-8", b"bad request\n"
    if len(request) >= MAX_REQUEST_BYTES:
        status, body = 431, b"the request is too large\n"
    elif len(parts) == 3 and parts[2].startswith(b"HTTP/1."):
        target = parts[1].split(b"?", 1)[0].decode("latin-1")
        if parts[0] != b"GET":
            status, body = 405, b"only GET is allowed\n"
        elif target not in pages:
            status, body = 404, b"the pages are " + ", ".join(sorted(pages)).encode() + b"\n"
        else:
            status, kind, body = pages[target]()
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Service Unavailable')}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class _Connection:
    def __init__(self, server: HttpServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._request = b""
        self._response = memoryview(b"")
        self._timer = server.reactor.call_later(TIMEOUT_S, self.close)
        server.reactor.register(sock.fileno(), READ, self._ready)

    def _ready(self, _events: int) -> None:
        try:
            if self._response:
                self._send()
            else:
                self._receive()
        except BlockingIOError:
            return
        except OSError:
            self.close()

    def _receive(self) -> None:
        data = self._sock.recv(MAX_REQUEST_BYTES)
        self._request += data
        ended = b"\r\n\r\n" in self._request or b"\n\n" in self._request
        if ended or len(self._request) >= MAX_REQUEST_BYTES:
            self._response = memoryview(respond(self._request, self._server.pages))
            self._server.reactor.modify(self._sock.fileno(), WRITE)
            self._send()
        elif not data:
            self.close()

    def _send(self) -> None:
        self._response = self._response[self._sock.send(self._response) :]
        if not self._response:
            self.close()

    def close(self) -> None:
        self._timer.cancel()
        self._server.reactor.unregister(self._sock.fileno())
        self._sock.close()
        self._server.connections.discard(self)


class HttpServer:
    """Serves pages on connections."""

    def __init__(self, reactor: Reactor, pages: Mapping[str, Page]) -> None:
        self.reactor = reactor
        self.pages = pages
        self.connections: set[_Connection] = set()

    def serve(self, sock: socket.socket) -> None:
        """Take over a connection."""
        if len(self.connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self.connections.add(_Connection(self, sock))

    def close(self) -> None:
        for connection in list(self.connections):
            connection.close()
