"""The small HTTP server of /metrics and /healthz, and the trace header that any caller may send."""

from __future__ import annotations

from collections.abc import Iterator

from remora.agent import trace_context
from remora.agent.http import Page, respond


def _page() -> tuple[int, str, bytes]:
    return 200, "text/plain", b"ok\n"


_PAGES: dict[str, Page] = {"/metrics": _page, "/healthz": _page}


def case(data: bytes) -> None:
    answer = respond(data, _PAGES)
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.count(b"\r\n\r\n") == 1
    first, _, second = data.decode("latin-1").partition("\n")
    found = trace_context.parse(first, second)
    assert found is None or (len(found.trace_id), len(found.span_id)) == (16, 8)


def seeds() -> Iterator[bytes]:
    yield b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"POST /healthz HTTP/1.0\n\n"
    yield b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\nvendor=value"
