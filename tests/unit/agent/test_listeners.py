"""Listening sockets: their mode, what may be replaced, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from remora.agent.listeners import Listener, SocketFile, bind_unix
from remora.errors import AlreadyExistsError, FailedPreconditionError
from remora.reactor import Reactor


@pytest.mark.parametrize("mode", [0o600, 0o666])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_a_socket_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with bind_unix(tmp_path / "a.sock", mode):
            assert stat.S_IMODE((tmp_path / "a.sock").lstat().st_mode) == mode
            assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    bind_unix(path, 0o600).close()
    assert path.exists()
    with bind_unix(path, 0o600), pytest.raises(AlreadyExistsError, match="another process listens"):
        bind_unix(path, 0o600)


def test_what_is_no_socket_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("precious")
    with pytest.raises(AlreadyExistsError, match="not a socket"):
        bind_unix(path, 0o600)
    assert path.read_text() == "precious"


def test_a_missing_directory_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="mkdir -p"):
        bind_unix(tmp_path / "none" / "a.sock", 0o600)


def test_closing_removes_only_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    reactor = Reactor()
    accepted: list[socket.socket] = []
    first = Listener(reactor, bind_unix(path, 0o600), accepted.append, SocketFile(path))
    path.unlink()
    second = Listener(reactor, bind_unix(path, 0o600), accepted.append, SocketFile(path))
    first.close()
    assert path.exists()
    second.close()
    second.close()
    assert not path.exists()
    reactor.close()
