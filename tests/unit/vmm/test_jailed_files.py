"""What a jailed monitor leaves as its state is taken as what it is: a file of its own, never a link to the host."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest

from remora.errors import FailedPreconditionError, PermissionDeniedError, UnavailableError
from remora.vmm import channel, firecracker, jail
from remora.vmm.contract import Ended


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
    made = jail.Jail(base, "one", base / "firecracker", uid=54321, gid=54321)
    made.root.mkdir(parents=True, exist_ok=True)
    return made


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


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@needs_root
def test_a_disk_with_a_second_name_is_copied_and_keeps_its_owner(tmp_path: Path) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.write_bytes(b"mine")
    os.link(disk, other)
    made = a_jail(tmp_path)
    name = jail.place(made, disk, "d0", writable=True)
    assert (disk.stat().st_uid, other.stat().st_uid) == (os.geteuid(), os.geteuid())
    assert (made.root / name.lstrip("/")).stat().st_ino != disk.stat().st_ino


@needs_root
def test_a_file_of_two_names_is_never_given_away(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"")
    os.link(tmp_path / "one", tmp_path / "two")
    fd = os.open(tmp_path / "one", os.O_RDONLY)
    try:
        with pytest.raises(PermissionDeniedError, match="another name"):
            jail._give(fd, 54321, 54321, 0o600)
    finally:
        os.close(fd)
    assert (tmp_path / "two").stat().st_uid == os.geteuid()


@needs_root
def test_what_only_root_may_read_is_copied_for_the_jails_group(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    made = a_jail(tmp_path)
    for mode, linked in ((0o644, True), (0o600, False)):
        kernel.chmod(mode)
        inside = made.root / jail.place(made, kernel, f"k{mode}").lstrip("/")
        assert (inside.stat().st_ino == kernel.stat().st_ino) is linked
        assert inside.stat().st_uid == os.geteuid()
        if not linked:
            assert (inside.stat().st_gid, inside.stat().st_mode & 0o777) == (54321, 0o440)


@needs_root
def test_a_link_that_a_jail_put_where_a_file_goes_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"host")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    made = a_jail(tmp_path)
    (made.root / "kernel").symlink_to(victim)
    for writable in (False, True):
        with pytest.raises(FailedPreconditionError):
            jail.place(made, kernel, "kernel", writable=writable)
    assert (victim.read_bytes(), victim.stat().st_uid) == (b"host", os.geteuid())


@needs_root
def test_a_root_is_emptied_but_for_the_agents_sockets_and_removed_without_following(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    made = a_jail(tmp_path / "base")
    (made.root / "dev").mkdir()
    (made.root / "channel.sock_2048").touch()
    (made.root / "dev" / "out").symlink_to(victim)
    (made.root / "out").symlink_to(victim)
    jail.prepare(made)
    assert [path.name for path in made.root.iterdir()] == ["channel.sock_2048"]
    (made.root / "out").symlink_to(victim)
    jail.remove(made)
    assert list((tmp_path / "base").iterdir()) == []
    assert (victim / "file").exists()
    jail.remove(made)


def test_a_base_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionDeniedError, match="chmod go-w"):
        jail.check_base(tmp_path)


def test_a_link_in_place_of_the_channel_leads_to_no_other_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as short:
        listener.bind(f"{short}/secret")
        listener.listen(1)
        Path(short, "channel.sock").symlink_to("secret")
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="non-socket"):
            channel.connect_socket(sock, Path(short, "channel.sock"))
        with pytest.raises(UnavailableError):
            channel.connect(Path(short), 1024, 1.0)
        with socket.socket(socket.AF_UNIX) as sock:
            channel.connect_socket(sock, Path(short, "secret"))


V1 = """\
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""


@pytest.mark.parametrize(
    ("version", "settings", "folders"),
    [
        (1, ("memory.limit_in_bytes=1", "memory.swappiness=0"), ["/sys/fs/cgroup/memory/vms/one"]),
        (1, ("cpu.shares=2", "cpuacct.x=1"), ["/sys/fs/cgroup/cpu,cpuacct/vms/one"]),
        (2, ("memory.max=1",), ["/sys/fs/cgroup/unified/vms/one"]),
        (2, (), []),
        (1, (), []),
    ],
)
def test_the_cgroups_of_a_jail_are_found_as_the_jailer_makes_them(
    tmp_path: Path, version: int, settings: tuple[str, ...], folders: list[str]
) -> None:
    made = jail.Jail(
        tmp_path, "one", tmp_path / "fc", 1, 1, cgroup_version=version, parent_cgroup="vms", cgroups=settings
    )
    assert [str(folder) for folder in jail.cgroup_folders(made, V1)] == folders


@pytest.mark.parametrize(
    ("status", "ended"), [(0, (0, 0)), (1, (1, 0)), (137, (0, 9)), (139, (0, 11)), (148, (148, 0)), (157, (157, 0))]
)
def test_a_jailed_end_by_a_signal_is_told_from_firecrackers_own_statuses(status: int, ended: tuple[int, int]) -> None:
    assert jail.told_by_init(Ended(status, 0, ""))[:2] == ended
