"""Which places the SDK looks at, in which order, and what it refuses to look at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remora.client.address import Address, candidates, parse
from remora.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:///run/a.sock", ("unix", "/run/a.sock", 0)),
        ("/run/a.sock", ("unix", "/run/a.sock", 0)),
        ("unix://@name", ("unix", "@name", 0)),
        ("vsock://2:2048", ("vsock", "2", 2048)),
        ("vsock://host:1024", ("vsock", "2", 1024)),
        ("vsock://3", ("vsock", "3", 2048)),
        ("tcp://127.0.0.1:65500", ("tcp", "127.0.0.1", 65500)),
        ("tcp://localhost:1", ("tcp", "localhost", 1)),
        ("tcp://[::1]:9", ("tcp", "::1", 9)),
    ],
)
def test_each_form_of_an_address_is_understood(text: str, expected: tuple[str, str, int]) -> None:
    assert tuple(parse(text))[:3] == expected


@pytest.mark.parametrize("text", ["unix:///run/a.sock", "unix://@name", "vsock://2:2048", "tcp://[::1]:9"])
def test_an_address_prints_as_it_was_written(text: str) -> None:
    assert parse(text).url == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "somewhere",
        "http://x",
        "unix://relative",
        "unix://",
        "unix://@",
        "unix:///" + "x" * 107,
        "unix:///a\0b",
        "vsock://-1:2",
        "vsock://0:2",
        "vsock://4294967295:2",
        "vsock://2:",
        "vsock://2:x",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:²",
    ],
)
def test_a_text_that_is_no_address_is_refused_with_the_allowed_forms(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(text)
    assert caught.value.fix


@pytest.mark.parametrize(
    "text", ["tcp://10.0.0.1:2048", "tcp://vaccel-agent:8888", "tcp://0.0.0.0:1", "tcp://127.0.0.1.evil.example:1"]
)
def test_plain_tcp_to_another_machine_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="loopback"):
        parse(text)


def test_tls_takes_its_files_from_the_address_before_the_environment() -> None:
    environ = {"REMORA_TLS_CA": "/ca", "REMORA_TLS_CERT": "/cert", "REMORA_TLS_KEY": "/key"}
    address = parse("tls://node.example:99?cert=/own&name=spiffe://prod/agent", environ=environ)
    assert (address.kind, address.host, address.port, address.url) == (
        "tls",
        "node.example",
        99,
        "tls://node.example:99",
    )
    certificates = address.certificates
    assert certificates is not None
    assert (certificates.authorities, certificates.certificate, certificates.key) == ("/ca", "/own", "/key")
    assert certificates.name == "spiffe://prod/agent"
    assert parse("tls://node", environ={}).port == 2048
    assert parse("tls://[::1]:7", environ={}).host == "::1"


@pytest.mark.parametrize("text", ["tls://", "tls://:1", "tls://a b:1", "tls://a:0", "tls://a:1?x=y", "tls://a:1?ca="])
def test_tls_addresses_that_say_nothing_sensible_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(text, environ={})


def test_a_named_address_is_the_only_candidate() -> None:
    environ = {"REMORA_ADDRESS": "unix:///b", "VACCEL_RPC_ADDRESS": "unix:///c"}
    assert [str(a) for a in candidates("unix:///a", environ)] == ["unix:///a"]
    assert candidates(None, environ) == [Address("unix", "/b", 0, "REMORA_ADDRESS")]
    environ["REMORA_ADDRESS"] = ""
    assert candidates(None, environ) == [Address("unix", "/c", 0, "VACCEL_RPC_ADDRESS")]


def test_an_error_in_the_environment_names_the_variable() -> None:
    with pytest.raises(InvalidArgumentError, match="VACCEL_RPC_ADDRESS"):
        candidates(None, {"VACCEL_RPC_ADDRESS": "nonsense"})


def test_without_a_name_the_socket_of_the_microvm_is_tried_before_vsock() -> None:
    found = [str(a) for a in candidates(None, {})]
    assert found[0] == "unix:///run/remora/accel.sock"
    assert found[-1] == "vsock://2:2048"


def test_an_agent_of_the_same_user_is_found_but_not_one_in_a_directory_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remora").mkdir()
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    own = f"unix://{tmp_path}/remora/accel.sock"
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner or 1000)
    if owner == 0:
        os.chown(tmp_path / "remora", 1000, -1)
    assert own in [str(a) for a in candidates(None, environ)]
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert own not in [str(a) for a in candidates(None, environ)]
