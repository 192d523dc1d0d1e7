"""Others' microVMs, piece by piece: patterns, what shims and QEMU say, what containerd wrote, who may change a path."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from agent_process import wait_until
from fleets import Node, cri
from remora.agent.fleets.bundles import Bundles
from remora.agent.fleets.layouts import Glob, Kata, parse_fleet
from remora.agent.fleets.shims import cid_of_monitor, parse_agent_url
from remora.agent.hybrid import HybridSocket, open_directory
from remora.errors import InvalidArgumentError, PermissionDeniedError, RemoraError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kata:x",
        "kata:/a/../b",
        "firecracker",
        "firecracker:v/*/x",
        "firecracker:/v/*",
        "firecracker:/*/*/x",
        "crio",
    ],
)
def test_what_is_no_fleet_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_fleet(text)


def test_a_pattern_names_directories_and_follows_no_symlink_below_the_operators_part(tmp_path: Path) -> None:
    real = tmp_path / "real"
    for name in ("fn-1", "fn-2", "other", ".hidden", "bad name"):
        (real / name / "root").mkdir(parents=True)
    (real / "fn-3").symlink_to(real / "other")
    (tmp_path / "link").symlink_to(real)
    places = list(Glob(f"{tmp_path}/link/fn-*/root/v.sock").places())
    assert [(place.id, place.socket) for place in places] == [
        (name, real / name / "root/v.sock") for name in ("fn-1", "fn-2")
    ]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hvsock:///run/vc/vm/x/clh.sock:1024", (Path("/run/vc/vm/x/clh.sock"), 0)),
        ("vsock://4021:1024", (None, 4021)),
        ("remote:///run/x.sock:1024", (None, 0)),
        ("hvsock://relative:1024", (None, 0)),
        ("vsock://-1:1024", (None, 0)),
        ("", (None, 0)),
    ],
)
def test_what_a_shim_says(url: str, found: tuple[Path | None, int]) -> None:
    assert parse_agent_url(url) == found


@pytest.mark.parametrize(
    ("words", "cid"),
    [
        (["qemu", "-name", "sandbox-s1,debug-threads=on", "-device", "vhost-vsock-pci,id=v,guest-cid=77,x=1"], 77),
        (["qemu", "-name", "sandbox-s1", "-device", "vhost-vsock-ccw,guest-cid=78"], 78),
        (["qemu", "-name", "sandbox-s10", "-device", "vhost-vsock-pci,guest-cid=77"], 0),
        (["sh", "-c", "guest-cid=77", "sandbox-s1"], 0),
        (["qemu", "-name", "sandbox-s1", "-append", "x vhost-vsock-pci,guest-cid=79"], 0),
    ],
)
def test_the_cid_is_that_of_the_sandboxs_own_qemu(tmp_path: Path, words: list[str], cid: int) -> None:
    (tmp_path / "123").mkdir()
    (tmp_path / "123/cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (tmp_path / "pid").write_text("123\n")
    assert cid_of_monitor(tmp_path / "pid", "s1", tmp_path) == cid
    (tmp_path / "pid").write_text("../1")
    assert cid_of_monitor(tmp_path / "pid", "s1", tmp_path) == 0


def test_a_qemu_sandbox_is_the_same_whoever_tells_of_its_cid(tmp_path: Path) -> None:
    node = Node(tmp_path)
    kata = Kata(tmp_path)
    monitors = tmp_path / "run/vc/vm/s1"
    monitors.mkdir(parents=True)
    argv = ["qemu", "-c", "read line", "sh", "-name", "sandbox-s1", "-device", "vhost-vsock-pci,guest-cid=70003"]
    with subprocess.Popen(argv, executable="/bin/sh", stdin=subprocess.PIPE) as qemu:
        (monitors / "pid").write_text(f"{qemu.pid}\n")
        # A process shows its command line a moment after its exec has succeeded.
        wait_until(lambda: list(kata.others(set())), "the command line")
        (first,) = kata.others(set())
        node.shim("run/vc/sbs", "s1", lambda: b"vsock://70003:1024")
        (second,) = kata.others(set())
        qemu.communicate(b"\n")
    node.close()
    assert first == second
    assert (first.cid, first.directory) == (70003, monitors)
    assert list(kata.others({"s1"})) == []


def test_shims_that_hang_are_asked_more_and_more_seldom_and_no_look_waits_for_all(tmp_path: Path) -> None:
    node = Node(tmp_path)
    asked: list[str] = []
    ended = threading.Event()

    def hang(name: str) -> bytes:
        asked.append(name)
        ended.wait(30)
        return b""

    for number in range(5):
        node.shim("run/vc/sbs", f"s{number}", partial(hang, f"s{number}"))
    kata = Kata(tmp_path)
    began_s = time.monotonic()
    assert list(kata.others(set())) == []
    assert time.monotonic() - began_s < 3
    assert asked == ["s0"]
    assert list(kata.others(set())) == []
    assert asked == ["s0", "s1"]
    ended.set()
    node.close()


def test_a_bundle_that_others_may_write_or_that_is_none_says_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    bundles = Bundles(node.containerd)
    good = node.pod("prod", "web")
    found = bundles.names(good)
    assert found is not None
    assert (found.id, found.sandbox, found.wanted) == (good, f"prod.web.{good[:8]}", True)
    # What was read stays; another look is for another id.
    assert bundles.names(good) is found
    short = bundles.names(good[:32], short=True)
    assert short is not None
    assert short.id == good
    assert bundles.names(good[:32]) is None
    path = node.bundle("a" * 64, cri("a" * 64, "prod", "x"))
    path.chmod(0o666)
    assert bundles.names("a" * 64) is None
    for number, text in enumerate(("", "[]", '{"annotations": 7}', "[" * 100_000, '{"annotations": {"a": 1}}')):
        path = node.bundle(f"{number}" * 64, {})
        path.write_text(text)
        assert bundles.names(f"{number}" * 64) is None
    target = node.bundle("b" * 64, cri("b" * 64, "prod", "x"))
    target.unlink()
    target.symlink_to(path)
    assert bundles.names("b" * 64) is None


def test_a_pod_that_wants_no_accelerator_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    found = Bundles(node.containerd).names(node.pod("prod", "web", **{"io.remora.accelerator": "false"}))
    assert found is not None
    assert not found.wanted


def test_a_directory_below_somebody_elses_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    strangers = tmp_path / "strangers"
    below = strangers / "root"
    below.mkdir(parents=True)
    os.close(open_directory(below))
    os.chown(strangers, 4711, 4711)
    with pytest.raises(PermissionDeniedError, match="may change"):
        open_directory(below)
    os.chown(below, 4711, 4711)
    os.close(open_directory(below))
    strangers.chmod(0o777)
    with pytest.raises(PermissionDeniedError, match="may change"):
        open_directory(below)
    strangers.chmod(0o1777)
    os.close(open_directory(below))


def test_a_directory_of_another_user_than_the_monitors_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    directory = tmp_path / "vm"
    directory.mkdir()
    os.chown(directory, 4711, 4711)
    hybrid = HybridSocket(directory / "v.sock")  # before there is a monitor
    assert hybrid.owner == 4711
    hybrid.close()
    script = f"import socket; socket.socket(socket.AF_UNIX).bind({str(directory / 'v.sock')!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    os.chown(directory / "v.sock", 4712, 4712)
    with pytest.raises(PermissionDeniedError, match="belongs to uid 4711"):
        HybridSocket(directory / "v.sock")


@pytest.mark.parametrize("path", ["/nowhere/v.sock", "/etc/passwd/v.sock", "/tmp/../etc/v.sock", f"/tmp/{'x' * 90}"])
def test_what_is_no_place_for_a_socket_is_refused(path: str) -> None:
    with pytest.raises(RemoraError):
        HybridSocket(Path(path))
