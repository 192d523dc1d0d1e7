"""Files that the guest gives the host: whatever a container put in their place, PID 1 neither waits nor leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remora.errors import InvalidArgumentError, NotFoundError
from remora.guest import files


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "VOLUMES", str(tmp_path))
    made = tmp_path / "message"
    made.mkdir()
    return made


def test_the_end_of_a_file_is_returned(volume: Path) -> None:
    (volume / "data").write_bytes(b"x" * 100 + b"the end")
    assert files.get("message", "data", 7) == b"the end"
    with pytest.raises(NotFoundError):
        files.get("message", "none", 7)


def test_what_is_no_file_is_refused_at_once(volume: Path) -> None:
    (volume / "secret").write_text("not for the host")
    (volume / "link").symlink_to(volume / "secret")
    os.mkfifo(volume / "pipe")
    (volume / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(InvalidArgumentError):
            files.get("message", name, 100)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x"])
def test_no_path_leaves_its_volume(volume: Path, path: str) -> None:
    with pytest.raises(InvalidArgumentError):
        files.get("message", path, 100)
