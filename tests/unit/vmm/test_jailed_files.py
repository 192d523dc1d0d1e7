"""What a jailed monitor leaves as its state is taken as what it is: a file of its own, never a link to the host."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from remora.errors import UnavailableError
from remora.vmm import firecracker


def rename_across_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_paths: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "rename", refused)


@pytest.mark.parametrize("across", [False, True])
def test_a_link_in_the_place_of_a_snapshot_touches_no_file_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
) -> None:
    victim = tmp_path / "passwd"
    victim.write_text("root")
    victim.chmod(0o644)
    (tmp_path / "state").symlink_to(victim)
    if across:
        rename_across_file_systems(monkeypatch)
    with pytest.raises(UnavailableError):
        firecracker._keep(tmp_path / "state", tmp_path / "kept")
    assert victim.stat().st_mode & 0o777 == 0o644
    assert not (tmp_path / "kept").exists()


def test_a_pipe_in_the_place_of_a_snapshot_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state")
    with pytest.raises(UnavailableError, match="not a file of its own"):
        firecracker._keep(tmp_path / "state", tmp_path / "kept")


@pytest.mark.parametrize("across", [False, True])
def test_a_snapshot_is_moved_out_of_the_jail_for_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
) -> None:
    (tmp_path / "state").write_bytes(b"memory")
    if across:
        rename_across_file_systems(monkeypatch)
    firecracker._keep(tmp_path / "state", tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == b"memory"
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "state").exists()
