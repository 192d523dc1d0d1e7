"""Identity and addresses: what a socket says about who calls, and where the agent may listen."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from remora.agent.addresses import parse_address, parse_listen_address
from remora.agent.callers import Callers
from remora.agent.identity import check_private_directory, of_sandbox
from remora.errors import InvalidArgumentError, PermissionDeniedError


def test_a_unix_peer_is_known_by_its_user() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found, attachment = Callers(lambda _uid: None, lambda _cid: None).identify(ours)
    assert found.key == found.tenant == f"uid:{os.geteuid()}"
    assert attachment is None


def test_no_sandbox_or_tenant_can_take_the_name_of_another_kind_of_caller() -> None:
    names = {of_sandbox("a", "", {}, "", False).tenant, of_sandbox("b", "a", {}, "", False).tenant, "uid:0", "tcp"}
    assert len(names | {"shared"}) == 5
    assert of_sandbox("x", "shared", {}, "", False).tenant != "shared"
    with pytest.raises(InvalidArgumentError):
        of_sandbox("uid:0", "", {}, "", False)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 129, "ä", "a\n", "a:b"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a valid name"):
        of_sandbox(name, "", {}, "", False)


def test_addresses_are_read_as_elsewhere() -> None:
    assert parse_address("unix:///run/a.sock").path == Path("/run/a.sock")
    assert parse_address("unix://@name").abstract == "name"
    assert parse_address("/run/a.sock").path == Path("/run/a.sock")
    assert parse_address("tcp://127.0.0.1:2048").port == 2048
    assert parse_address("tcp://localhost:1").host == "127.0.0.1"
    assert parse_address("tcp://[::1]:1").host == "::1"


@pytest.mark.parametrize("text", ["tcp://0.0.0.0:2048", "tcp://10.0.0.1:1", "tcp://example.org:1", "tcp://[::]:1"])
def test_tcp_beyond_loopback_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"other machines.*loopback"):
        parse_address(text)


def test_listening_has_forms_of_its_own() -> None:
    assert parse_address("vsock://:2048").cid == socket.VMADDR_CID_ANY
    assert parse_address("vsock://host:99").cid == 2
    assert parse_address("vsock://any").port == 2048
    everywhere = parse_listen_address("oip+tls://0.0.0.0:8443")
    assert (everywhere.tls, everywhere.door, everywhere.scheme) == (True, "oip", "oip+tls")


@pytest.mark.parametrize(
    "text",
    [
        "vsock://x:1",
        "vsock://:x",
        "vsock://0:1",
        "tls://example.org:1",
        "tls://0.0.0.0",
        "",
        "unix://relative",
        "http://x",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "/" + "x" * 120,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_address(text)


def test_a_directory_for_a_guests_socket_must_be_our_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    check_private_directory(own)
    link = tmp_path / "link"
    link.symlink_to(own)
    with pytest.raises(InvalidArgumentError, match="symlink"):
        check_private_directory(link)
    with pytest.raises(InvalidArgumentError, match="does not exist"):
        check_private_directory(tmp_path / "none")
    with pytest.raises(InvalidArgumentError, match="plain absolute"):
        check_private_directory(own / ".." / "own")
    own.chmod(0o777)
    with pytest.raises(PermissionDeniedError, match="everyone may write"):
        check_private_directory(own)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    os.chown(own, 12345, 12345)
    with pytest.raises(PermissionDeniedError, match="uid 12345"):
        check_private_directory(own)
