"""The QMP client against a real QEMU with no machine, and against one that misbehaves."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from remora.errors import DeadlineExceededError, FailedPreconditionError, ProtocolError, UnavailableError
from remora.vmm.process import spawn
from remora.vmm.qemu import find_binary
from remora.vmm.qmp import MAX_LINE_BYTES, QmpClient


@pytest.fixture
def qemu() -> Iterator[QmpClient]:
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_WRONLY)
    with theirs:
        arguments = [find_binary(), "-M", "none", "-nodefaults", "-display", "none"]
        arguments += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        pid = spawn(arguments, keep_fds=[theirs.fileno()], output_fd=null)
    os.close(null)
    client = QmpClient(ours)
    try:
        client.handshake(20)
        yield client
    finally:
        client.close()
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def ask_for_ever(qemu: QmpClient) -> None:
    while True:
        qemu.command("query-status")


def test_commands_are_answered_and_the_version_is_known(qemu: QmpClient) -> None:
    assert qemu.version.count(".") == 2
    assert qemu.command("query-status")["status"] == "running"


def test_a_refused_command_says_why(qemu: QmpClient) -> None:
    with pytest.raises(FailedPreconditionError, match="no-such-command"):
        qemu.command("no-such-command")
    assert qemu.command("query-name") == {}


def test_a_descriptor_can_be_passed(qemu: QmpClient) -> None:
    read_end, write_end = os.pipe()
    try:
        qemu.command("getfd", {"fdname": "x"}, fds=[read_end])
        qemu.command("closefd", {"fdname": "x"})
    finally:
        os.close(read_end)
        os.close(write_end)


def test_the_end_of_qemu_is_reported(qemu: QmpClient) -> None:
    qemu.command("quit")
    with pytest.raises(UnavailableError):
        ask_for_ever(qemu)


@pytest.fixture
def peer() -> Iterator[tuple[QmpClient, socket.socket]]:
    ours, theirs = socket.socketpair()
    client = QmpClient(ours)
    with theirs:
        yield client, theirs
    client.close()


def test_a_silent_peer_meets_the_deadline(peer: tuple[QmpClient, socket.socket]) -> None:
    client, _ = peer
    with pytest.raises(DeadlineExceededError, match="query-status"):
        client.command("query-status", timeout_s=0.05)


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"neither": 1}\n'])
def test_nonsense_is_a_protocol_error(peer: tuple[QmpClient, socket.socket], line: bytes) -> None:
    client, theirs = peer
    theirs.sendall(line)
    with pytest.raises(ProtocolError):
        client.command("query-status", timeout_s=5)


def test_an_endless_line_is_bounded(peer: tuple[QmpClient, socket.socket]) -> None:
    client, theirs = peer

    def flood() -> None:
        try:
            theirs.sendall(b"x" * (2 * MAX_LINE_BYTES))
        except OSError:
            pass  # the client hung up on us, as it should

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(ProtocolError, match="more than"):
        client.command("query-status", timeout_s=10)
    client.close()
    thread.join(10)
    assert not thread.is_alive()


def test_events_between_command_and_reply_are_kept(peer: tuple[QmpClient, socket.socket]) -> None:
    client, theirs = peer
    theirs.sendall(b'{"event": "STOP"}\n{"return": {"status": "paused"}}\n')
    assert client.command("query-status", timeout_s=5) == {"status": "paused"}
    assert [event["event"] for event in client.events] == ["STOP"]
