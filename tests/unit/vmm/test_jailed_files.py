"""What a jailed monitor leaves as its state is taken as what it is: a file of its own, never a link to the host."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from remora.errors import UnavailableError
from remora.vmm import firecracker, jail


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


def a_jail(base: Path) -> jail.Jail:
    return jail.Jail(base, "one", base / "firecracker", uid=54321, gid=54321)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_a_disk_that_a_jail_writes_is_not_the_hosts_own_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"mine")
    disk.chmod(0o600)
    os.truncate(disk, 1 << 30)
    inside = a_jail(tmp_path).root / jail.place(a_jail(tmp_path), disk, "d0", writable=True).lstrip("/")
    assert (disk.stat().st_uid, disk.stat().st_mode & 0o777) == (os.geteuid(), 0o600)
    info = inside.stat()
    assert (info.st_uid, info.st_mode & 0o777, info.st_size) == (54321, 0o600, 1 << 30)
    assert info.st_blocks * 512 < 1 << 20, "holes stay holes"
    with inside.open("r+b") as file:
        assert file.read(4) == b"mine"
        file.seek(0)
        file.write(b"jail")
    with disk.open("rb") as file:
        assert file.read(4) == b"mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_a_disk_without_a_name_is_given_to_its_jail_as_it_is(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        name = jail.place(a_jail(tmp_path), Path(f"/proc/self/fd/{fd}"), "d0", writable=True)
        assert (a_jail(tmp_path).root / name.lstrip("/")).stat().st_ino == os.fstat(fd).st_ino
    finally:
        os.close(fd)
