"""Logs and the small HTTP server: what an operator sees, and what a hostile peer cannot do to it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.agent.http import MAX_CONNECTIONS, HttpServer, respond
from remora.agent.listeners import Listener
from remora.agent.logs import Log
from remora.reactor import Reactor

PAGES = {"/healthz": lambda: (200, "text/plain", b"ok\n")}


def lines_of(write: object, *, json_lines: bool = False) -> list[str]:
    read_fd, write_fd = os.pipe()
    log = Log(write_fd, json_lines=json_lines)
    write(log)  # type: ignore[operator]  # a function of a log
    log.close()
    os.close(write_fd)
    with os.fdopen(read_fd) as stream:
        return stream.read().splitlines()


def test_a_line_is_json_with_its_fields() -> None:
    (line,) = lines_of(lambda log: log.of_tenant("t", "refused", rule="limits.x", count=3), json_lines=True)
    entry = json.loads(line)
    assert entry["event"] == "refused"
    assert entry["tenant"] == "t"
    assert entry["rule"] == "limits.x"
    assert entry["level"] == "warning"


def test_a_guests_text_cannot_forge_a_line_or_fill_the_disk() -> None:
    lines = lines_of(lambda log: log.of_tenant("t", "refused", model="x\n2026 error forged\x1b[2J" + "y" * 10_000))
    assert len(lines) == 1
    assert "\x1b" not in lines[0]
    assert len(lines[0]) < 1000


def test_one_tenants_flood_of_lines_is_cut_and_counted() -> None:
    def flood(log: Log) -> None:
        for _ in range(500):
            log.of_tenant("noisy", "refused")
        log.of_tenant("quiet", "refused")

    lines = lines_of(flood)
    assert 40 < len(lines) < 100
    assert any("tenant=quiet" in line for line in lines)


def test_what_was_left_out_is_told_once_the_flood_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("remora.agent.logs.time.monotonic", lambda: clock[0])

    def flood(log: Log) -> None:
        for _ in range(60):
            log.of_tenant("noisy", "refused")
        log.sweep()  # it may go on: nothing is said yet
        clock[0] += 6
        log.sweep()
        log.sweep()
        assert log.suppressed == 10

    lines = lines_of(flood)
    assert len(lines) == 51
    assert "lines left out tenant=noisy suppressed_before=10" in lines[-1]


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        log = Log(full.fileno())
        for _ in range(10):
            log.of_tenant("t", "refused")
        log.close()
        assert log.dropped == 10


def test_a_reader_that_does_not_read_stops_nobody() -> None:
    read_fd, write_fd = os.pipe()
    log = Log(write_fd)
    for _ in range(10_000):
        log.info("x" * 100)
    assert log.dropped > 0
    os.close(read_fd)
    log.close()
    os.close(write_fd)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET /healthz?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET /none HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * 9000, 431),
    ],
)
def test_the_http_server_answers_with_the_right_status(request_bytes: bytes, status: int) -> None:
    assert respond(request_bytes, PAGES).startswith(f"HTTP/1.1 {status} ".encode())


@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    assert respond(data, PAGES).startswith(b"HTTP/1.1 ")


def test_a_slow_http_client_holds_up_nobody(tmp_path: Path) -> None:
    reactor = Reactor()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "m.sock"))
    listener.listen()
    listener.setblocking(False)
    server = HttpServer.of_pages(reactor, PAGES)
    accepting = Listener(reactor, listener, server.serve)
    with socket.socket(socket.AF_UNIX) as slow, socket.socket(socket.AF_UNIX) as quick:
        slow.connect(str(tmp_path / "m.sock"))
        slow.send(b"GET /hea")
        quick.connect(str(tmp_path / "m.sock"))
        quick.send(b"GET /healthz HTTP/1.1\r\n\r\n")
        quick.setblocking(False)
        answer = b""
        for _ in range(100):
            reactor.run_once(0.05)
            try:
                answer += quick.recv(1000)
            except BlockingIOError:
                continue
            if answer.endswith(b"ok\n"):
                break
    accepting.close()
    assert answer.endswith(b"ok\n")
    server.close()
    reactor.close()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9464", "127.0.0.1:9464", "[::1]:9464", "192.0.2.1", ""])
def test_a_client_of_this_machine_may_read_a_loopback_address(host: str) -> None:
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert respond(request, PAGES, local=True).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "localhost.evil"])
def test_a_web_page_whose_name_was_rebound_may_not(host: str) -> None:
    request = f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nhost : {host}\r\n\r\n".encode()
    assert respond(request, PAGES, local=True).startswith(b"HTTP/1.1 403 ")
    assert respond(request, PAGES).startswith(b"HTTP/1.1 200 "), "on a Unix socket no browser speaks"


def answered(reactor: Reactor, server: HttpServer, others: Sequence[socket.socket]) -> bool:
    """Tell whether somebody who comes now gets an answer; everything is closed after that."""
    ours, theirs = socket.socketpair()
    server.serve(theirs)
    ours.send(b"GET /healthz HTTP/1.1\r\n\r\n")
    for _ in range(5):
        reactor.run_once(0.05)
    answer = ours.recv(1000)
    server.close()
    for sock in (*others, ours):
        sock.close()
    reactor.close()
    return answer.endswith(b"ok\n")


def test_connections_that_say_nothing_keep_no_reader_of_metrics_out() -> None:
    reactor = Reactor()
    server = HttpServer.of_pages(reactor, PAGES)
    silent = []
    for _ in range(3 * MAX_CONNECTIONS):
        ours, theirs = socket.socketpair()
        server.serve(theirs)
        silent.append(ours)
    assert len(server.connections) == MAX_CONNECTIONS
    assert answered(reactor, server, silent)


def test_http_clients_that_ask_and_do_not_read_do_not_keep_others_out() -> None:
    reactor = Reactor()
    server = HttpServer.of_pages(reactor, {**PAGES, "/long": lambda: (200, "text/plain", bytes(4 << 20))})
    idle = []
    for _ in range(MAX_CONNECTIONS):
        ours, theirs = socket.socketpair()
        server.serve(theirs)
        ours.send(b"GET /long HTTP/1.1\r\n\r\n")
        idle.append(ours)
    for _ in range(100):
        reactor.run_once(0.05)
        if all(one.sending for one in server.connections):
            break
    assert len(server.connections) == MAX_CONNECTIONS
    assert answered(reactor, server, idle)
