"""`remora doctor` on hosts that lack things: each gap is told with its fix, and no strange host stops it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleets import Node
from remora.cli.main import main
from remora.doctor import cluster, examination, machines, node
from remora.doctor.report import Check, Finding, worst


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host on which nothing is installed but what the test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_host_without_qemu_cannot_run_microvms_and_is_told_the_package(empty_path: Path) -> None:
    found = by_name(machines.monitors())
    assert found["QEMU"].state == "bad"
    assert "apt-get install qemu-system-x86" in found["QEMU"].fix
    # A choice, not a gap.
    assert found["Firecracker"].state == found["Cloud Hypervisor"].state == "note"


def test_installed_monitors_are_told_with_their_versions(empty_path: Path) -> None:
    program(empty_path, "qemu-system-x86_64", "echo QEMU emulator version 9.2.1")
    program(empty_path, "firecracker", "echo Firecracker v1.16.1")
    program(empty_path, "cloud-hypervisor", "echo cloud-hypervisor v53.0.0")
    found = by_name(machines.monitors())
    details = {name: found[name].detail for name in ("QEMU", "Firecracker", "Cloud Hypervisor")}
    assert details == {
        "QEMU": "version 9.2.1",
        "Firecracker": "version 1.16.1",
        "Cloud Hypervisor": "version 53.0.0",
    }
    assert "same Firecracker release" in found["jailer"].fix


def test_kata_sandboxes_that_nobody_serves_are_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path / "no-agent"))
    kata = Node(tmp_path)
    monkeypatch.setattr(node, "KATA", kata.root)
    monkeypatch.setattr(node, "CONTAINERD", kata.containerd)
    assert "none" in by_name(node.fleets())["Kata sandboxes"].detail
    kata.boot(kata.path("go-cloud-hypervisor", kata.pod("prod", "web")))
    found = by_name(node.fleets())["Kata sandboxes"]
    kata.close()
    assert (found.state, found.detail) == ("note", "1, 0 of them served by the agent")
    assert "remora agent --attach kata" in found.fix


def test_without_bubblewrap_no_worker_can_be_confined(empty_path: Path) -> None:
    found = by_name(node.confinement())
    assert found["bubblewrap"].state == "bad"
    assert found["bubblewrap"].fix == "apt-get install bubblewrap"


def test_a_bubblewrap_that_may_make_no_namespaces_is_told_with_the_settings(empty_path: Path) -> None:
    program(empty_path, "bwrap", "echo 'No permissions to create new namespace' >&2; exit 1")
    found = by_name(node.confinement())
    assert found["bubblewrap"].state == "bad"
    assert "No permissions" in found["bubblewrap"].detail
    assert "kernel.unprivileged_userns_clone" in found["bubblewrap"].fix


@pytest.mark.parametrize(
    ("says", "state", "words"),
    [
        ("containerd github.com/containerd/containerd 1.4.13 x", "bad", "too old"),
        ("containerd github.com/containerd/containerd 1.6.20~ds1 x", "note", "not running"),
        ("containerd github.com/containerd/containerd/v2 v2.1.0 x", "note", "not running"),
    ],
)
def test_containerds_version_decides(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, state: str, words: str
) -> None:
    monkeypatch.setattr(cluster, "SOCKET", empty_path / "no.sock")
    program(empty_path, "containerd", f"echo {says}")
    found = by_name(cluster.containerd())
    assert (found["containerd"].state, words in found["containerd"].detail) == (state, True)
    assert "remora node install" in found["Remora's shim"].fix


def test_a_running_containerds_snapshotters_and_cri_are_looked_at(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SOCKET", empty_path)
    program(empty_path, "containerd", "echo containerd x 1.7.2 y")
    program(
        empty_path,
        "ctr",
        "echo 'TYPE ID PLATFORMS STATUS'; echo 'io.containerd.snapshotter.v1 native linux/amd64 ok';"
        "echo 'io.containerd.snapshotter.v1 overlayfs linux/amd64 error'; echo 'io.containerd.grpc.v1 cri - skip'",
    )
    found = by_name(cluster.containerd())
    assert found["snapshotters"].fix == "use overlayfs"
    assert "disabled" in found["CRI plugin"].detail


def test_little_room_on_disk_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMORA_STATE_DIR", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(node, "LITTLE_SPACE_BYTES", 1 << 60)
    found = by_name(node.space())
    assert "REMORA_STATE_DIR" in found["disk"].fix


def test_a_check_that_fails_is_a_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("a strange host")

    def fine() -> Iterator[Finding]:
        yield Finding("host", "rest", "ok", "looked at")

    monkeypatch.setattr(examination, "CHECKS", (Check("first", broken), Check("second", fine)))
    seen: list[str] = []
    findings = examination.examine(seen.append)
    assert seen == ["first", "second"]
    assert [finding.state for finding in findings] == ["note", "ok"]
    assert "a strange host" in findings[0].detail


def test_the_status_is_1_only_where_a_main_part_cannot_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("host", "thing", "note", "is missing", "install it")
    for state, status in (("ok", 0), ("note", 0), ("bad", 1)):
        check = Check("thing", lambda state=state: iter([finding._replace(state=state)]))  # type: ignore[misc]
        monkeypatch.setattr(examination, "CHECKS", (check,))
        assert main(["doctor"]) == status
        text = capsys.readouterr().out
        assert "-> install it" in text
        assert main(["doctor", "--json"]) == status
        assert json.loads(capsys.readouterr().out)["state"] == state


def test_the_worst_finding_is_the_verdict() -> None:
    assert worst([]) == "ok"
    assert worst([Finding("a", "b", "note", ""), Finding("a", "c", "bad", "")]) == "bad"


def test_every_part_of_this_host_can_be_looked_at() -> None:
    findings = examination.examine()
    assert not [finding for finding in findings if finding.area == "doctor"]
    assert {finding.area for finding in findings} >= {"host", "microVMs", "agent", "workers", "accelerators", "storage"}
    # Whatever is not right comes with something to do, but for what is no more than a fact.
    assert all(finding.fix for finding in findings if finding.state == "bad")
