"""Sockets that were open before: which of systemd's are taken, and what becomes of those that nobody wants."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from remora.agent.addresses import parse_address
from remora.agent.inherited import Inherited, from_systemd
from remora.agent.listeners import bind_unix

_TAKE = """
import os, sys
from remora.agent.inherited import from_systemd
from remora.errors import RemoraError
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES=sys.argv[1])
try:
    print(*[address.text for address in from_systemd(os.environ).addresses()], "LISTEN_FDS" in os.environ)
except RemoraError as error:
    print(error)
"""


def taken(sock: socket.socket, name: str) -> str:
    """Return what a process makes of a socket that it gets as systemd passes it."""
    fd = sock.fileno()
    command = f"exec {sys.executable} -c '{_TAKE.replace(chr(39), chr(34))}' {name} 3<&{fd}"
    run = subprocess.run(
        ["bash", "-c", command], pass_fds=[fd], capture_output=True, text=True, check=False, timeout=30
    )
    return (run.stdout + run.stderr).strip()


def test_a_socket_of_systemd_is_known_by_its_address_and_name(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "a.sock"))
        sock.listen()
        assert taken(sock, "remora-agent.socket") == f"unix://{tmp_path}/a.sock False"
        assert taken(sock, "oip") == f"oip+unix://{tmp_path}/a.sock False"
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert "open to other machines" in taken(sock, "x")
        assert taken(sock, "oip+tls") == f"oip+tls://0.0.0.0:{port} False"


def test_what_is_no_listening_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "a.sock"))
        assert "not a listening stream socket" in taken(sock, "x")
    with (tmp_path / "file").open("w") as file:
        assert "not as many sockets are open" in taken(file, "x")  # type: ignore[arg-type]  # what is refused


def test_sockets_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}
    assert from_systemd(environ).addresses() == []
    assert environ == {}


@pytest.mark.parametrize("kept", [True, False])
def test_what_nobody_takes_is_closed_and_its_file_removed_unless_it_is_somebody_elses(
    tmp_path: Path, kept: bool
) -> None:
    path = tmp_path / "a.sock"
    inherited = Inherited([(f"unix://{path}", bind_unix(path, 0o600))], kept=kept)
    other, _ = inherited.bind(parse_address(f"unix://{tmp_path}/b.sock"), 0o600)
    inherited.close()
    other.close()
    assert path.exists() == kept


def test_a_socket_whose_file_is_gone_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    inherited = Inherited([(f"unix://{path}", bind_unix(path, 0o600))])
    path.unlink()
    sock, kept = inherited.bind(parse_address(f"unix://{path}"), 0o600)
    with sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert not kept
