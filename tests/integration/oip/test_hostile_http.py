"""HTTP that means harm, on the REST and the gRPC face: a 4xx, a status or a hang-up; then the agent serves on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

MEMORY_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def _unharmed(agent: Any) -> Iterator[None]:
    before, pid = agent.memory_bytes(), agent.pid
    yield
    assert agent.alive()
    assert agent.pid == pid
    status, answer = infer(agent, {"inputs": [number(1.5)]})
    assert status == 200
    assert json.loads(answer)["outputs"][0]["data"] == [1.5]
    assert agent.memory_bytes() - before < MEMORY_BYTES


def number(value: Any) -> dict[str, Any]:
    return {"name": "input", "shape": [1, 1, 1, 1], "datatype": "FP32", "data": [value]}


def exchange(agent: Any, raw: bytes) -> bytes:
    """Send bytes; return what comes back until the agent hangs up, or nothing more comes of a whole answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(agent.oip_socket))
        try:
            sock.sendall(raw)
        except OSError:
            pass  # it may hang up in the middle: that is an answer
        got = b""
        while True:
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                return got
            if not data:
                return got
            got += data


def infer(agent: Any, document: Any) -> tuple[int, bytes]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    raw = b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    head, _, answer = exchange(agent, raw % len(body) + body).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), answer


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\1\2\3garbage\n\n",
        b"GET /v2\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\nHost: x\n\n",
        b"GET /v2 HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40000 + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nslow",
    ],
)
def test_what_is_no_plain_request_is_refused_and_the_connection_ended(agent: Any, raw: bytes) -> None:
    assert exchange(agent, raw).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "document",
    [
        b"[" * 100000,
        b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"inputs": [{"name": "input", "shape": [1], "datatype": "FP32", "data": [NaN]}]}',
        b'{"id": ' + b"9" * 5000 + b"}",
        b" " * 300000,
        {},
        {"inputs": 7},
        {"inputs": [7]},
        {"inputs": [number("x")]},
        {"inputs": [number(1e300)]},
        {"inputs": [number(True)]},
        {"inputs": [{**number(1.0), "shape": [-1]}]},
        {"inputs": [{**number(1.0), "shape": [1 << 50, 1 << 50]}]},
        {"inputs": [{**number(1.0), "shape": [2]}]},
        {"inputs": [{**number(1.0), "datatype": "BYTES"}]},
        {"inputs": [{**number(1.0), "datatype": None}]},
        {"inputs": [{**number(1.0), "parameters": {"binary_data_size": 4}}]},
        {"inputs": [number(1.0), number(2.0)]},
        {"inputs": [number(1.0)], "outputs": [{"name": "nope"}]},
    ],
)
def test_a_wrong_body_is_the_callers_error(agent: Any, document: Any) -> None:
    status, answer = infer(agent, document)
    assert 400 <= status < 500
    assert json.loads(answer)["error"]


def test_broken_http2_ends_only_its_connection(agent: Any) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = bytes.fromhex("000000040000000000")
    for attack in (
        b"garbage that is no frame at all....",
        settings + bytes.fromhex("ffffff010400000001"),  # HEADERS of 16 MiB
        settings + bytes.fromhex("000001000100000001") + b"x",  # DATA on a stream that is not open
        settings + bytes.fromhex("000001000900000001") + b"\xff",  # more padding than bytes
        settings + bytes.fromhex("000008060000000000") * 1 + b"pingpong" + settings * 5000,
    ):
        exchange(agent, preface + attack)


def test_one_connection_serves_many_requests_one_after_the_other(agent: Any) -> None:
    one = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert exchange(agent, one * 50 + last).count(b"HTTP/1.1 200 OK") == 51


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: localhost", 200),
        ("Host: 127.0.0.1:8000", 200),
        ("Host: rebound.example", 403),
        ("Host: localhost\r\nOrigin: http://page.example", 403),
        ("Host: localhost\r\nOrigin: null", 403),
    ],
)
def test_a_web_page_in_a_browser_of_this_machine_is_not_answered(agent: Any, headers: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", agent.oip_port), 10) as sock:
        sock.sendall(f"GET /v2 HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n".encode())
        assert int(sock.recv(65536).split(b" ")[1]) == status
