"""Faults that real machines have and test machines do not: made by a QEMU that is a script, or by a full disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvms import Remora

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120), pytest.mark.usefixtures("clean")]


def wrapped_qemu(directory: Path, script: str) -> dict[str, str]:
    """Return an environment in which QEMU is a shell script; `$QEMU` in it is the real one."""
    real = shutil.which("qemu-system-x86_64")
    path = directory / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\nQEMU={real}\n{script}\n")
    path.chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin:/usr/sbin:/sbin"}


def test_a_guest_that_hangs_while_it_boots_is_booted_once_more(remora: Remora, tmp_path: Path) -> None:
    env = wrapped_qemu(
        tmp_path,
        f'echo x >>{tmp_path}/starts; [ $(wc -l <{tmp_path}/starts) = 1 ] && exec $QEMU "$@" -S; exec $QEMU "$@"',
    )
    done = remora("run", "--no-accel", "--boot-timeout", "8s", remora.image, "echo", "up", env=env)
    assert (done.returncode, done.stdout) == (0, b"up\n"), done.stderr.decode()
    assert (tmp_path / "starts").read_text() == "x\nx\n"


def test_a_guest_that_never_comes_up_is_given_up(remora: Remora, tmp_path: Path) -> None:
    env = wrapped_qemu(tmp_path, 'exec $QEMU "$@" -S')
    done = remora("run", "--no-accel", "--boot-timeout", "500ms", remora.image, "true", env=env)
    assert done.returncode == 10
    assert done.stderr.count(b"\n") == 1
    assert b"did not answer" in done.stderr


def test_a_qemu_that_cannot_start_is_quoted(remora: Remora, tmp_path: Path) -> None:
    env = wrapped_qemu(tmp_path, "echo 'qemu: something is missing' >&2; exit 1")
    done = remora("run", "--no-accel", remora.image, "true", env=env)
    assert done.returncode == 7
    assert done.stderr.count(b"\n") == 1
    assert b"QEMU ended with status 1" in done.stderr
    assert b"something is missing" in done.stderr


def test_a_kernel_that_panics_is_quoted(remora: Remora, tmp_path: Path) -> None:
    """The guest powers off by itself, for whatever reason; its console is the only witness."""
    env = wrapped_qemu(
        tmp_path,
        'for a in "$@"; do case $a in *tsc_early_khz*) a="$a init=/nosuch rdinit=/nosuch";; esac; '
        'set -- "$@" "$a"; shift; done; exec $QEMU "$@"',
    )
    done = remora("run", "--no-accel", remora.image, "true", env=env)
    assert done.returncode == 10
    assert b"the guest powered off by itself" in done.stderr


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted: root is missing")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_reported_and_leaves_nothing(remora: Remora, full_disk: Path) -> None:
    (full_disk / "filler").write_bytes(bytes(60 << 10))
    with pytest.raises(OSError, match="No space"):
        (full_disk / "more").write_bytes(bytes(60 << 10))
    done = remora("run", "--no-accel", remora.image, "true", env={"REMORA_RUNTIME_DIR": str(full_disk)})
    assert done.returncode != 0
    assert done.stderr.count(b"\n") == 1, done.stderr.decode()
    assert b"No space left" in done.stderr
    assert {path.name for path in full_disk.iterdir()} <= {"filler", "more"}
