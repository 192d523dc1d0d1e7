"""The loop under everything: readiness, time, other threads, children, and bad callbacks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from remora.reactor import READ, Reactor


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def reactor(errors: list[BaseException]) -> Iterator[Reactor]:
    loop = Reactor(on_error=errors.append)
    yield loop
    loop.close()


def test_a_ready_socket_calls_its_handler(reactor: Reactor) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        received: list[bytes] = []

        def ready(_events: int) -> None:
            received.append(ours.recv(10))
            reactor.stop()

        reactor.register(ours.fileno(), READ, ready)
        theirs.send(b"x")
        reactor.run()
        assert received == [b"x"]


def test_an_unregistered_handler_is_not_called_even_if_its_event_was_already_polled(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    calls: list[int] = []

    def first_wins(number: int) -> None:
        calls.append(number)
        for ours, _ in pairs:
            reactor.unregister(ours.fileno())

    for number, (ours, theirs) in enumerate(pairs):
        reactor.register(ours.fileno(), READ, lambda _events, number=number: first_wins(number))  # type: ignore[misc]
        theirs.send(b"x")
    reactor.run_once(1)
    assert len(calls) == 1
    for pair in pairs:
        for one in pair:
            one.close()


def test_timers_run_in_order_of_time_and_a_cancelled_one_not_at_all(reactor: Reactor) -> None:
    calls: list[str] = []
    reactor.call_later(0.02, lambda: calls.append("late"))
    reactor.call_later(0.02, reactor.stop)
    reactor.call_later(0.01, lambda: calls.append("early"))
    reactor.call_later(0.0, lambda: calls.append("cancelled")).cancel()
    reactor.run()
    assert calls == ["early", "late"]


def test_another_thread_can_post_a_call(reactor: Reactor) -> None:
    callers: list[int] = []

    def called() -> None:
        callers.append(threading.get_ident())
        reactor.stop()

    thread = threading.Thread(target=reactor.post, args=(called,))
    thread.start()
    reactor.run()
    thread.join()
    assert callers == [threading.get_ident()]


def test_a_callback_that_raises_is_reported_and_the_others_go_on(reactor: Reactor, errors: list[BaseException]) -> None:
    calls: list[str] = []
    reactor.call_soon(lambda: [][0])
    reactor.call_soon(lambda: calls.append("after"))
    reactor.run_once(0)
    assert calls == ["after"]
    assert [type(error) for error in errors] == [IndexError]


def test_the_end_of_a_child_is_noticed_once(reactor: Reactor) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        ended: list[int] = []

        def gone() -> None:
            ended.append(child.pid)
            reactor.stop()

        reactor.watch_pid(child.pid, gone)
        reactor.run()
        assert ended == [child.pid]
        reactor.run_once(0)
        assert len(ended) == 1


def test_watching_a_child_can_be_given_up(reactor: Reactor) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        stop = reactor.watch_pid(child.pid, lambda: pytest.fail("was told"))
        stop()
        stop()
        child.communicate(b"\n")
        reactor.run_once(0)


def test_a_signal_is_handled_in_the_loop(reactor: Reactor) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        reactor.on_signal(signal.SIGUSR1, reactor.stop)
        os.kill(os.getpid(), signal.SIGUSR1)
        reactor.run()
        assert signal.getsignal(signal.SIGUSR1) != before
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_timer_a_century_away_is_no_reason_to_stop(reactor: Reactor, errors: list[BaseException]) -> None:
    reactor.call_later(100 * 365 * 86400.0, reactor.stop)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        reactor.register(ours.fileno(), READ, lambda _events: None)
        reactor.run_once()
    assert errors == []
