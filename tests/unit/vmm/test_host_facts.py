"""What is asked of the host once per boot: TSC rate, KVM."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from remora.vmm import probe
from remora.vmm.hostcache import cached
from remora.vmm.tsc import host_tsc_khz


def test_an_answer_is_found_once_per_boot(tmp_path: Path) -> None:
    answers = iter([1, 2])
    assert [cached(tmp_path, "x", lambda: next(answers)) for _ in range(3)] == [1, 1, 1]
    note = tmp_path / "host-x.json"
    note.write_text(json.dumps({"boot": "an earlier one", "answer": 1}))
    assert cached(tmp_path, "x", lambda: next(answers)) == 2


def test_a_damaged_note_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "host-x.json").write_text("{")
    assert cached(tmp_path, "x", lambda: "found") == "found"


def test_the_tsc_rate_is_that_of_a_processor_and_repeatable(tmp_path: Path) -> None:
    first, second = (host_tsc_khz(tmp_path / name) for name in ("a", "b"))
    assert 500_000 < first < 10_000_000
    # 100 ppm: the tolerance within which a template may be moved.
    assert abs(first - second) < first * 1e-4


def fake_qemu(tmp_path: Path, script: str) -> str:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("script", "works"),
    [
        ("echo 'Kernel panic - not syncing: VFS: Unable to mount root fs'; exec sleep 60", True),
        ("echo 'qemu: failed to set MSR 0x10a'; exit 134", False),
        ("echo 'booting'; exec sleep 60", False),
    ],
)
def test_kvm_works_if_a_kernel_comes_up(tmp_path: Path, script: str, works: bool) -> None:
    binary = fake_qemu(tmp_path, script)
    assert probe.boots(Path("/kernel"), "kvm", timeout_s=1.0, binary=binary) is works
