"""`remora run` on Firecracker and Cloud Hypervisor. Neither runs without KVM, so a fake of each takes the commands, and
QEMU emulates the machine that they describe: all but the monitor's own process is the real thing."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

import fake_vmm
from microvms import Remora

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]


@pytest.fixture(params=[("firecracker", "1.17.0"), ("firecracker", "0.23.1"), ("cloud-hypervisor", "53.0")], ids=str)
def monitor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a fake on PATH; returns its name."""
    kind, version = request.param
    fake_vmm.install(tmp_path, kind, version)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VMM_GUEST", "real")
    # The fake needs none, and the driver asks whether KVM boots guests.
    monkeypatch.setenv("REMORA_ACCELERATOR", "kvm")
    return str(kind)


def test_a_command_runs_on_each_monitor_and_leaves_nothing(remora: Remora, monitor: str, tmp_path: Path) -> None:
    env = dict(os.environ)
    done = remora(
        "run", "--no-accel", "--vmm", monitor, remora.image, "sh", "-c", "cat; exit 7", stdin=b"hello", env=env
    )
    assert (done.returncode, done.stdout) == (7, b"hello"), done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert remora.json("ps", "--json") == []


def test_an_unknown_monitor_is_refused_with_the_names(remora: Remora) -> None:
    done = remora("run", "--no-accel", "--vmm", "vmware", remora.image, "true")
    assert done.returncode == 2
    assert b"use qemu, firecracker, cloud-hypervisor" in done.stderr


@pytest.mark.parametrize("name", ["firecracker", "cloud-hypervisor"])
def test_a_monitor_that_is_not_installed_is_named_with_what_to_do(remora: Remora, name: str) -> None:
    done = remora("run", "--no-accel", "--vmm", name, remora.image, "true")
    assert done.returncode == 7
    assert f"{name} is not installed".encode() in done.stderr
    assert b"--vmm qemu" in done.stderr
