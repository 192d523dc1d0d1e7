"""HTTP/1.1 without I/O: one request after the other, each body received into the memory where it will stay.

A connection that is idle owns no buffer. While a request is answered nothing more is read, so a client that pipelines
waits, and at most one body per connection is held. A request that takes too long is answered with 408; one that cannot
be understood ends the connection, because nobody knows where the next one would begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from math import ceil

from remora.agent.hints import again_s
from remora.agent.web import http1_head
from remora.agent.web.exchange import ALLOCATE_BYTES, Allocate, Body, Exchange, Link, Piece
from remora.agent.web.http1_head import MAX_HEAD_BYTES, BadRequestError, Head
from remora.errors import RemoraError
from remora.workers.contract import Block

JSON = "application/json"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}
#: The slowest sender that is waited for, besides the time a request may take anyway.
_SLOWEST_BYTES_PER_S = 65536
_SCRATCH_BYTES = 8192
_HEADER_OF_TENSORS = "inference-header-content-length"


class Http1Exchange(Exchange):
    """A request over HTTP/1.1. `path` is decoded, in segments; `verb` is GET, POST, ..."""

    __slots__ = ("_connection", "path", "verb")

    def __init__(self, connection: Http1, head: Head, body: memoryview, block: Block | None) -> None:
        super().__init__(head.headers, body, block)
        self._connection = connection
        self.path = head.path
        self.verb = head.method

    def respond(
        self,
        status: int,
        pieces: Sequence[Piece],
        *,
        headers: Mapping[str, str] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> bool:
        """Answer. Returns False if the exchange was over already; `on_sent` is called in any case, once."""
        sent = self._answering(on_sent)
        if sent is None:
            return False
        self._connection.answer(status, pieces, headers or {}, sent, head_only=self.verb == "HEAD")
        return True

    def fail(self, error: RemoraError, headers: Mapping[str, str] | None = None) -> bool:
        """Answer with an error."""
        return self.respond(error.http_status, [error_body(error)], headers={**(headers or {}), **error_headers(error)})


def error_body(error: RemoraError) -> bytes:
    return json.dumps({"error": str(error)}).encode()


def error_headers(error: RemoraError) -> dict[str, str]:
    """Return the headers of an error's answer; when to come back is in whole seconds (RFC 9110, section 10.2.3)."""
    after_s = again_s(error)
    hint = {} if after_s is None else {"Retry-After": str(max(1, ceil(after_s)))}
    return {"Content-Type": JSON, **hint}


def refusal(error: RemoraError) -> bytes:
    """Return the whole response to a connection that is not served."""
    body = error_body(error)
    lines = [f"HTTP/1.1 {error.http_status} {_REASONS.get(error.http_status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in error_headers(error).items()]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class Http1:
    """One HTTP/1.1 connection (`exchange.Speaker`).

    Args:
        handler: Called with each request; answers now or later.
        limit_name: How a refusal names what sets `max_body_bytes`.
        call_soon: The reactor's.
        timeout_s: How long a begun request may take, besides the time for its bytes at 64 KiB/s.
    """

    __slots__ = (
        "_allocate",
        "_begun_s",
        "_body",
        "_busy",
        "_call_soon",
        "_exchange",
        "_handler",
        "_head",
        "_keep_alive",
        "_leaving",
        "_limit_name",
        "_link",
        "_max_body_bytes",
        "_now_s",
        "_over",
        "_raw",
        "_refusal",
        "_scratch",
        "_skip",
        "_timeout_s",
    )

    def __init__(
        self,
        link: Link,
        handler: Callable[[Http1Exchange], None],
        *,
        scratch: memoryview,
        allocate: Allocate,
        max_body_bytes: int,
        limit_name: str = "limits.message_bytes",
        timeout_s: float,
        now_s: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._link = link
        self._handler = handler
        self._scratch = scratch[:_SCRATCH_BYTES]
        self._allocate = allocate
        self._max_body_bytes, self._limit_name = max_body_bytes, limit_name
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._call_soon = call_soon
        #: Bytes that are not a whole head yet, or follow the request that is being answered.
        self._raw = b""
        self._head: Head | None = None
        self._body: Body | None = None
        self._skip = 0
        self._refusal: RemoraError | None = None
        self._exchange: Http1Exchange | None = None
        self._busy = False
        self._keep_alive = True
        self._leaving = False
        self._begun_s = 0.0
        self._over = False

    # -- receiving --------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        return self._scratch if self._body is None or self._skip else self._body.rest()

    def received(self, count: int) -> None:
        if self._over:
            return
        if self._busy:
            # Read together with the request that is being answered, before its connection could hold reading.
            self._raw += self._scratch[:count]
            return
        if not self._begun_s:
            self._begun_s = self._now_s()
        if self._skip:
            skipped = min(self._skip, count)
            self._skip -= skipped
            self._raw = bytes(self._scratch[skipped:count])
            if not self._skip:
                self._complete()
        elif self._body is not None:
            self._body.filled += count
            if self._body.complete:
                self._complete()
        else:
            self._raw += self._scratch[:count]
            self._parse()

    def _parse(self) -> None:
        """Look for a whole head among the bytes that are there."""
        raw = self._raw.removeprefix(b"\r\n")  # RFC 9112, section 2.2
        end = raw.find(b"\r\n\r\n")
        try:
            if end < 0:
                if len(raw) > MAX_HEAD_BYTES:
                    raise BadRequestError(f"the request's head is longer than {MAX_HEAD_BYTES} bytes", 431)
                if b"\n\n" in raw or b"\0" in raw:
                    raise BadRequestError("the request is not HTTP/1.1: lines end with CR and LF")
                return
            if end > MAX_HEAD_BYTES:
                raise BadRequestError(f"the request's head is longer than {MAX_HEAD_BYTES} bytes", 431)
            head = http1_head.parse(raw[:end])
        except BadRequestError as error:
            self._give_up(error)
            return
        self._raw = raw[end + 4 :]
        self._accept(head)

    def _accept(self, head: Head) -> None:
        self._head = head
        self._keep_alive = head.keep_alive and not self._leaving
        size = head.content_length
        try:
            if size > self._max_body_bytes:
                raise http1_head.too_large(size, self._max_body_bytes, self._limit_name)
            http1_head.check_encoding(head.headers)
            tensors_at = http1_head.header_number(head.headers, _HEADER_OF_TENSORS) or 0
            self._body = Body(size, self._allocate, tensors_at)
        except RemoraError as error:
            if head.expects_continue or size > self._max_body_bytes:
                self._give_up(error)
                return
            self._refusal = error
            self._skip = max(0, size - len(self._raw))
            self._raw = self._raw[size:]
            if not self._skip:
                self._complete()
            return
        self._raw = self._raw[self._body.put(self._raw) :]
        if self._body.complete:
            self._complete()
        elif head.expects_continue:
            self._link.transmit([_CONTINUE])

    def _complete(self) -> None:
        """A request is there, or was refused and has gone by."""
        head, body, refusal = self._head, self._body, self._refusal
        assert head is not None
        self._head = self._body = self._refusal = None
        self._begun_s = 0.0
        self._busy = True
        self._link.hold(reading=True)
        view, block = (body.view, body.block) if body is not None else (memoryview(b""), None)
        exchange = self._exchange = Http1Exchange(self, head, view, block)
        if refusal is not None:
            exchange.fail(refusal)
            self._link.refused(refusal)
        else:
            self._handler(exchange)

    def _give_up(self, error: RemoraError) -> None:
        """Answer what cannot be followed by another request, and end."""
        self._keep_alive = False
        self._over = True
        if self._body is not None:
            self._body.drop()
            self._body = None
        self._busy = True
        self.answer(error.http_status, [error_body(error)], error_headers(error), lambda: None)
        self._link.refused(error)

    # -- answering --------------------------------------------------------------------------------------------------

    def answer(
        self,
        status: int,
        pieces: Sequence[Piece],
        headers: Mapping[str, str],
        on_sent: Callable[[], None],
        *,
        head_only: bool = False,
    ) -> None:
        """Send a response; the next request follows once it is sent."""
        size = sum(map(len, pieces))
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {size}"]
        lines += ["Connection: keep-alive" if self._keep_alive else "Connection: close", "", ""]
        head = "\r\n".join(lines).encode("latin-1")

        def sent() -> None:
            on_sent()
            self._next()

        if head_only:
            self._link.transmit([head], sent)
        elif size < ALLOCATE_BYTES:
            self._link.transmit([b"".join((head, *pieces))], sent)
        else:
            self._link.transmit([head, *pieces], sent)

    def _next(self) -> None:
        """The answer is sent: go on with what has come meanwhile, or wait."""
        self._exchange = None
        if not self._keep_alive:
            self._over = True
            self._raw = b""
            self._link.finish()
            return
        self._busy = False
        if self._raw:
            self._begun_s = self._now_s()
            self._call_soon(self._resume)  # not from within the last answer: many small requests would nest
        else:
            self._link.hold(reading=False)

    def _resume(self) -> None:
        if self._over or self._busy:
            return
        self._link.hold(reading=False)
        self._parse()

    @property
    def unsent_bytes(self) -> int:
        return 0

    # -- time and end -----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._busy or bool(self._begun_s)

    def leave(self) -> None:
        if self._leaving or self._over:
            return
        self._leaving, self._keep_alive = True, False
        if not self.busy:
            self._over = True
            self._link.finish()

    def check(self, now_s: float) -> float | None:
        if not self._begun_s or self._busy or self._over:
            return None
        expected = len(self._body.view) if self._body is not None else self._skip
        late_s = self._begun_s + self._timeout_s + expected / _SLOWEST_BYTES_PER_S
        if now_s < late_s:
            return late_s
        self._give_up(BadRequestError("the request took too long to arrive", 408))
        return None

    def closed(self, reason: RemoraError) -> None:
        self._over = True
        if self._body is not None:
            self._body.drop()
        if self._exchange is not None:
            self._exchange.cancel(reason)
