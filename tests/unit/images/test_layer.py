"""One tar layer to one EROFS layer: what must survive, and what a hostile archive may not do."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from image_maker import convert, describe, directory, member, symlink, tar
from remora.errors import InvalidArgumentError, RemoraError
from remora.images.limits import Limits


def test_owners_modes_times_links_and_attributes_survive(tmp_path: Path) -> None:
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\xff\x00\x0a\x3d\x80\x00\x00\x00\x00\x00\x00\x00"
    layer = convert(
        tar(
            directory("etc", 0o750, uid=5, gid=6, mtime=1000),
            member("etc/shadow", b"secret", mode=0o4755, uid=70000, gid=80000, mtime=1700000000.5),
            member("ping", b"elf", xattrs={"security.capability": capability, "user.note": b"n\xc3\xb6te"}),
            symlink("link", "../anywhere/at all"),
            member("fifo", kind=tarfile.FIFOTYPE, mode=0o600),
        ),
        tmp_path / "l",
    )
    found = describe(layer)
    assert found["/etc"] == ("drwxr-x---", 5, 6, 1000, b"", {})
    assert found["/etc/shadow"] == ("-rwsr-xr-x", 70000, 80000, 1700000000, b"secret", {})
    assert found["/ping"][5] == {b"security.capability": capability, b"user.note": b"n\xc3\xb6te"}
    assert found["/link"][:1] + found["/link"][4:5] == ("lrwxrwxrwx", b"../anywhere/at all")
    assert found["/fifo"][0] == "prw-------"


def test_hard_links_are_one_inode(tmp_path: Path) -> None:
    from remora.images.erofs_read import ErofsReader

    layer = convert(tar(member("a", b"x" * 9000), member("d/b", kind=tarfile.LNKTYPE, target="a")), tmp_path / "l")
    with ErofsReader(layer) as reader:
        a, b = reader.lookup("/a"), reader.lookup("/d/b")
        assert a is not None
        assert b is not None
        assert (a.nid, a.links) == (b.nid, 2)


def test_whiteouts_become_what_overlayfs_wants(tmp_path: Path) -> None:
    layer = convert(tar(member("a/.wh.gone"), member("b/.wh..wh..opq"), member("b/new", b"1")), tmp_path / "l")
    found = describe(layer)
    assert found["/a/gone"][0] == "whiteout"
    assert found["/b"][5] == {b"trusted.overlay.opaque": b"y"}
    assert found["/b/new"][4] == b"1"
    assert not any(".wh." in name for name in found)


@pytest.mark.parametrize("whiteout_first", [True, False])
def test_a_whiteout_hides_only_lower_layers(tmp_path: Path, whiteout_first: bool) -> None:
    own = [member("f", b"new"), directory("d"), member("d/x", b"new")]
    marks = [member(".wh.f"), member(".wh.d")]
    found = describe(convert(tar(*(marks + own if whiteout_first else own + marks)), tmp_path / "l"))
    assert found["/f"][4] == b"new"
    assert found["/d/x"][4] == b"new"
    assert found["/d"][5] == {b"trusted.overlay.opaque": b"y"}


def test_an_opaque_mark_survives_the_directory_that_comes_after_it(tmp_path: Path) -> None:
    found = describe(convert(tar(member("d/.wh..wh..opq"), directory("d", 0o700)), tmp_path / "l"))
    assert found["/d"] == ("drwx------", 0, 0, 0, b"", {b"trusted.overlay.opaque": b"y"})


def test_orders_to_overlayfs_are_not_taken_from_an_archive(tmp_path: Path) -> None:
    forged = {"trusted.overlay.redirect": b"/etc", "user.overlay.opaque": b"y", "trusted.x": b"1", "user.ok": b"1"}
    found = describe(convert(tar(member("f", xattrs=forged)), tmp_path / "l"))
    assert found["/f"][5] == {b"user.ok": b"1"}


def test_device_nodes_and_forged_whiteouts_are_left_out(tmp_path: Path) -> None:
    layer = convert(
        tar(
            member("dev/sda", kind=tarfile.BLKTYPE, device=(8, 0)),
            member("dev/mem", kind=tarfile.CHRTYPE, device=(1, 1)),
            member("etc/passwd", kind=tarfile.CHRTYPE, device=(0, 0)),
        ),
        tmp_path / "l",
    )
    assert set(describe(layer)) == {"/", "/dev", "/etc"}


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    found = describe(
        convert(tar(member("f", b"old" * 5000), member("./f", b"new"), member("/f2", b"")), tmp_path / "l")
    )
    assert found["/f"][4] == b"new"
    assert "/f2" in found


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([member("../../etc/passwd", b"x")], "climbs out"),
        ([member("a/../../b", b"x")], "climbs out"),
        ([symlink("a", "/etc"), member("a/passwd", b"x")], "goes through 'a', which is a symbolic link"),
        ([member("a", b""), member("a/b", b"x")], "not a directory"),
        ([member("a", kind=tarfile.LNKTYPE, target="/etc/passwd")], "no earlier file"),
        ([member("a", kind=tarfile.LNKTYPE, target="../../etc/passwd")], "climbs out"),
        ([directory("d"), member("a", kind=tarfile.LNKTYPE, target="d")], "no earlier file"),
        ([member("a", kind=tarfile.SYMTYPE)], "no target"),
        ([member("a/.wh...", b"")], "hides nothing"),
        ([member("n" * 256, b"")], "file name of more than 255"),
        ([member("d/" * 2500 + "f", b"")], "a path of"),
        ([member("f", xattrs={"user.big": b"x" * 70000})], "extended attributes"),
    ],
)
def test_a_hostile_member_is_refused_by_name(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], complaint: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        convert(tar(*members), tmp_path / "l")


def test_nothing_of_a_hostile_archive_reaches_the_host(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InvalidArgumentError):
        convert(tar(member("../escaped", b"x")), tmp_path / "in/l")
    assert not (tmp_path / "escaped").exists()


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="more than 10 members"):
        convert(tar(*(member(str(n)) for n in range(11))), tmp_path / "l", Limits(max_entries=10))


@pytest.mark.parametrize("cut", [1, 300, 511, 513, 900, 1025])
def test_a_cut_off_archive_is_refused(tmp_path: Path, cut: int) -> None:
    whole = tar(member("f", b"x" * 600))
    with pytest.raises(InvalidArgumentError, match="cut off"):
        convert(whole[:cut], tmp_path / "l")


def test_garbage_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no tar archive"):
        convert(b"\x7fELF" + bytes(range(256)) * 4, tmp_path / "l")


def test_a_header_that_claims_gigabytes_costs_nothing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(InvalidArgumentError, match="a tar header of"):
        convert(info.tobuf(tarfile.GNU_FORMAT), tmp_path / "l")


def test_damaged_headers_never_raise_anything_but_our_own_error(tmp_path: Path) -> None:
    whole = tar(member("f", b"x" * 600, xattrs={"user.a": b"b"}), symlink("l", "f"))
    for at in range(0, len(whole), 37):
        for value in (0x00, 0x20, 0x2D, 0xFF, whole[at] ^ 1):
            broken = whole[:at] + bytes([value]) + whole[at + 1 :]
            try:
                convert(broken, tmp_path / "l")
            except RemoraError:
                continue
