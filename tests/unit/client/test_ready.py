"""`remora.ready()`: blocks in a template, returns different in each clone, and costs nothing elsewhere."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from remora.client.ready import generation, ready, reseed
from remora.errors import ProtocolError, UnavailableError


class FakePid1:
    """Answers one `READY` with what the test says."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(self.path)
        self.server.listen()
        self.server.settimeout(10)
        self.asked = threading.Event()
        self.answer_now = threading.Event()
        self.answer = b"GO 00ff\n"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        peer, _ = self.server.accept()
        with peer:
            peer.settimeout(10)
            if peer.recv(64) == b"READY\n":
                self.asked.set()
            if self.answer_now.wait(10) and self.answer:
                # In two pieces: a stream keeps no borders. A client that has read enough may leave early.
                with suppress(BrokenPipeError):
                    peer.sendall(self.answer[:2])
                    peer.sendall(self.answer[2:])

    def close(self) -> None:
        self.answer_now.set()
        self.thread.join(10)
        self.server.close()


@pytest.fixture
def pid1(tmp_path: Path) -> Iterator[FakePid1]:
    with ExitStack() as stack:
        fake = FakePid1(tmp_path / "guest.sock")
        stack.callback(fake.close)
        yield fake


def test_outside_a_microvm_it_returns_at_once(tmp_path: Path) -> None:
    before = generation()
    assert ready(str(tmp_path / "absent.sock")) is False
    assert generation() == before


def test_it_stays_until_pid_1_says_go_and_then_connections_are_stale(pid1: FakePid1) -> None:
    before = generation()
    returned = threading.Event()

    def function() -> None:
        assert ready(pid1.path) is True
        returned.set()

    thread = threading.Thread(target=function)
    thread.start()
    assert pid1.asked.wait(10)
    assert not returned.is_set()
    pid1.answer_now.set()
    assert returned.wait(10)
    thread.join(10)
    assert generation() == before + 1


def test_two_clones_draw_different_numbers_from_python_and_numpy() -> None:
    drawn = set()
    for entropy in (b"one", b"two"):
        random.seed(1)
        np.random.seed(1)
        reseed(entropy)
        drawn |= {random.random(), float(np.random.random())}
    assert len(drawn) == 4


def test_the_seed_uses_what_pid_1_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)  # as in a clone whose kernel was not reseeded: the same bytes
    drawn = []
    for entropy in (b"one", b"two", b"one"):
        reseed(entropy)
        drawn.append(random.random())
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


@pytest.mark.parametrize("answer", [b"NO\n", b"GO xyz\n", b"\xff\n", b"x" * 5000 + b"\n"])
def test_another_answer_is_a_protocol_error(pid1: FakePid1, answer: bytes) -> None:
    pid1.answer = answer
    pid1.answer_now.set()
    with pytest.raises(ProtocolError):
        ready(pid1.path)


def test_a_pid_1_that_goes_away_is_told(pid1: FakePid1) -> None:
    pid1.answer = b""
    pid1.answer_now.set()
    with pytest.raises(UnavailableError):
        ready(pid1.path)
