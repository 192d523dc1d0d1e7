"""What users write, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from remora.errors import InvalidArgumentError
from remora.sandboxes import options
from remora.sandboxes.options import Mount


@pytest.mark.parametrize(
    ("text", "mib"),
    [("256M", 256), ("1G", 1024), ("512MiB", 512), ("1048576", 1), ("1k", 1), ("1500K", 2), ("2gb", 2048)],
)
def test_memory_sizes(text: str, mib: int) -> None:
    assert options.parse_size_mib(text) == mib


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1.5G", "lots"])
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="256M or 1G"):
        options.parse_size_mib(text)


@pytest.mark.parametrize(("text", "seconds"), [("10", 10), ("10s", 10), ("1.5m", 90), ("2h", 7200), ("500ms", 0.5)])
def test_durations(text: str, seconds: float) -> None:
    assert options.parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-1s", "s", "10d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="10s, 5m or 1h"):
        options.parse_duration_s(text)


def test_variables_are_given_or_taken_from_ours() -> None:
    ours = {"HOME": "/root"}
    assert options.parse_env("A=b=c", ours) == ("A", "b=c")
    assert options.parse_env("A=", ours) == ("A", "")
    assert options.parse_env("HOME", ours) == ("HOME", "/root")
    assert options.parse_env("NONE", ours) is None
    with pytest.raises(InvalidArgumentError, match="KEY=VALUE"):
        options.parse_env("=x", ours)


def test_an_environment_file(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=1\n  B=two words \nOURS\nNONE\n")
    assert options.parse_env_file(file, {"OURS": "x"}) == [("A", "1"), ("B", "two words"), ("OURS", "x")]
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        options.parse_env_file(tmp_path / "none", {})


def test_mounts(tmp_path: Path) -> None:
    file = tmp_path / "x.erofs"
    file.write_bytes(b"")
    assert options.parse_mount("type=tmpfs,dst=/scratch") == Mount("tmpfs", None, "/scratch", False)
    assert options.parse_mount(f"type=image,src={file},dst=/x,ro") == Mount("image", file, "/x", True)
    assert options.parse_mount(f"source={tmp_path},target=/x,readonly") == Mount("bind", tmp_path, "/x", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type=tmpfs", "absolute destination"),
        ("type=tmpfs,dst=x", "absolute destination"),
        ("type=tmpfs,dst=/a/../b", "absolute destination"),
        ("type=nfs,dst=/x", "'nfs' is unknown"),
        ("type=bind,dst=/x,ro", "needs a source"),
        ("type=bind,src=/etc,dst=/x", "shares no writable files"),
        ("type=bind,src=/etc,dst=/x,rw", "shares no writable files"),
        ("type=bind,src=/no/such,dst=/x,ro", "/no/such does not exist"),
        ("type=image,src=/etc,dst=/x,ro", "/etc does not exist"),
        ("type=tmpfs,dst=/x,size=5", "'size=5' is unknown"),
    ],
)
def test_mounts_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        options.parse_mount(text)
