"""The EROFS writer against other readers: fsck.erofs where it is installed, the kernel where we may mount."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_maker import convert, describe, directory, member, symlink, tar
from remora.errors import DataLossError
from remora.images.erofs import BLOCK, crc32c
from remora.images.erofs_read import ErofsReader

#: Around every border: empty, inline, the longest inline tail, one block, and past them.
SIZES = (0, 1, 2047, 2048, 2049, 4031, 4032, 4033, 4095, 4096, 4097, 6144, 6145, 8192, 1 << 20, (1 << 20) + 1)


def _many(tmp_path: Path) -> Path:
    files = [member(f"size/{size}", os.urandom(size), mode=0o600 + size % 8) for size in SIZES]
    names = [member(f"many/{'n' * (number % 200)}{number}", b"", mtime=number) for number in range(3000)]
    links = [symlink(f"links/{length}", "t" * length) for length in (1, 59, 60, 2048, 2049, 4000)]
    xattrs = [member(f"attributes/{n}", b"x" * 3000, xattrs={"user.a": b"v" * n}) for n in (1, 2000, 4000, 60000)]
    return convert(tar(directory("size", 0o711), *files, *names, *links, *xattrs), tmp_path / "layer")


def test_crc32c_has_its_published_check_value() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # RFC 3720, B.4 uses the same polynomial


def test_fsck_finds_no_fault(tmp_path: Path) -> None:
    fsck = shutil.which("fsck.erofs")
    if fsck is None:
        pytest.skip("fsck.erofs (erofs-utils) is not installed")
    done = subprocess.run([fsck, _many(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def _mounted(layer: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "erofs", "-o", "loop,ro", layer, at], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount erofs here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def test_the_kernel_reads_what_was_written(tmp_path: Path) -> None:
    layer = _many(tmp_path)
    ours = describe(layer)
    with _mounted(layer, tmp_path / "mnt") as root:
        # Not Path.rglob: until Python 3.11.4 it follows links, and fails where a target is too long to be a name.
        found = [Path(folder) / name for folder, folders, files in os.walk(root) for name in (*folders, *files)]
        seen = {"/"} | {f"/{path.relative_to(root)}" for path in found}
        assert seen == set(ours)
        for name, (kind, uid, gid, mtime, content, xattrs) in ours.items():
            path = root / name.lstrip("/")
            about = path.lstat()
            assert (stat.filemode(about.st_mode), about.st_uid, about.st_gid) == (kind, uid, gid)
            assert int(about.st_mtime) == mtime
            if stat.S_ISREG(about.st_mode):
                assert path.read_bytes() == content
                assert isinstance(xattrs, dict)
                assert {key.encode(): os.getxattr(path, key) for key in os.listxattr(path)} == xattrs
            elif stat.S_ISLNK(about.st_mode):
                assert os.readlink(path).encode() == content


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    data = tar(directory("a"), member("a/f", b"x" * 5000, xattrs={"user.b": b"1", "user.a": b"2"}), member("b", b"y"))
    assert convert(data, tmp_path / "1").read_bytes() == convert(data, tmp_path / "2").read_bytes()


_names = st.text("abcXYZ-._ ö", min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..") and name[:4] != ".wh."
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_names, st.tuples(st.binary(max_size=10_000), st.integers(0, 0o7777)), max_size=40))
def test_whatever_goes_in_comes_out(tmp_path: Path, files: dict[str, tuple[bytes, int]]) -> None:
    data = tar(*(member(f"d/{name}", content, mode=mode) for name, (content, mode) in files.items()))
    found = describe(convert(data, tmp_path / "layer"))
    assert {name[3:]: row[4] for name, row in found.items() if name.startswith("/d/")} == {
        name: content for name, (content, _) in files.items()
    }


@pytest.mark.parametrize("damage", ["empty", "magic", "short"])
def test_a_damaged_layer_is_told_from_a_good_one(tmp_path: Path, damage: str) -> None:
    layer = convert(tar(member("f", b"x" * 20_000)), tmp_path / "layer")
    good = layer.read_bytes()
    layer.write_bytes({"empty": b"", "magic": bytes(len(good)), "short": good[:BLOCK]}[damage])
    with pytest.raises(DataLossError, match="damaged"):
        ErofsReader(layer)
