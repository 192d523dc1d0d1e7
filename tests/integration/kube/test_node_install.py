"""`remora node install` and `uninstall` on a node's root: what they write, repeat, refuse, and that nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_systemd import FakeSystemd, done, error
from remora.kube import node_bundle
from remora.kube.node_files import Node

DEBIAN = 'version = 2\n\n[plugins."io.containerd.internal.v1.opt"]\n  path = "/var/lib/containerd/opt"\n'
IMPORTS = 'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
SHIM = "usr/local/bin/containerd-shim-remora-v2"


def node(root: Path, *arguments: str, status: int = 0) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "remora", "node", *arguments, "--root", str(root), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert ran.returncode == status, ran.stderr
    return (json.loads(ran.stdout) if ran.stdout else {}), ran.stderr


def actions(answer: dict[str, Any]) -> set[str]:
    return {change["action"] for change in answer["changes"]}


def tree(root: Path) -> dict[str, bytes | None]:
    """Return every file with its bytes, every directory with None."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc/containerd").mkdir(parents=True)
    (tmp_path / "etc/containerd/config.toml").write_text(DEBIAN)
    (tmp_path / "etc/containerd/config.toml").chmod(0o640)
    return tmp_path


def test_a_node_is_set_up_once_and_then_as_before(root: Path) -> None:
    before = tree(root)
    first, _ = node(root, "install")
    assert first["changed"]
    assert (root / SHIM).stat().st_mode & 0o777 == 0o755
    assert (root / "etc/containerd/config.toml.before-remora").read_text() == DEBIAN
    assert (root / "etc/containerd/config.toml").stat().st_mode & 0o777 == 0o640
    assert "restart-needed" in actions(first)
    second, _ = node(root, "install")
    assert not second["changed"]
    assert actions(second) == {"keep"}
    node(root, "uninstall")
    assert tree(root) == before


def test_the_installed_shim_answers(root: Path) -> None:
    node(root, "install", "--no-agent")
    ran = subprocess.run([root / SHIM, "-v"], capture_output=True, text=True, check=False, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert not (root / "etc/systemd").exists()


def test_a_containerd_that_imports_a_directory_gets_a_drop_in_file(root: Path) -> None:
    (root / "etc/containerd/config.toml").write_text(IMPORTS)
    before = tree(root)
    node(root, "install")
    assert (root / "etc/containerd/config.toml").read_text() == IMPORTS
    assert "io.containerd.remora.v2" in (root / "etc/containerd/conf.d/remora.toml").read_text()
    answer, _ = node(root, "uninstall")
    assert "restart-needed" in actions(answer)
    assert tree(root) == before


def test_a_containerd_without_a_configuration_gets_one_and_loses_it_again(root: Path) -> None:
    (root / "etc/containerd/config.toml").unlink()
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/containerd").write_bytes(b"")
    before = tree(root)
    node(root, "install")
    assert (root / "etc/containerd/config.toml").read_text().startswith("version = 2\n")
    node(root, "install")
    node(root, "uninstall")
    assert tree(root) == before


def test_a_dry_run_says_all_and_does_nothing(root: Path) -> None:
    before = tree(root)
    answer, _ = node(root, "install", "--dry-run")
    assert {"write", "restart"} == actions(answer)
    assert tree(root) == before
    node(root, "install")
    installed = tree(root)
    answer, _ = node(root, "uninstall", "--dry-run")
    assert "remove" in actions(answer)
    assert tree(root) == installed


def test_what_the_operator_changed_is_kept_by_an_installation_and_left_by_its_end(root: Path) -> None:
    node(root, "install")
    settings = root / "etc/remora/runtime.toml"
    settings.write_text("[vm]\nmemory = '1G'\n")
    config = root / "etc/containerd/config.toml"
    config.write_text(config.read_text() + "# mine\n")
    node(root, "install")
    assert settings.read_text() == "[vm]\nmemory = '1G'\n"
    answer, _ = node(root, "uninstall")
    assert "leave" in actions(answer)
    assert settings.exists()
    assert config.read_text() == DEBIAN + "# mine\n"


def test_an_installation_that_was_cut_off_is_completed_or_taken_back(root: Path) -> None:
    before = tree(root)
    node(root, "install")
    (root / SHIM).unlink()
    (root / "etc/containerd/config.toml").write_text(DEBIAN)
    whole, _ = node(root, "install")
    assert whole["changed"]
    (root / SHIM).unlink()
    node(root, "uninstall")
    assert tree(root) == before


def test_a_node_without_containerd_or_with_one_not_understood_is_left_as_it_is(root: Path) -> None:
    config = root / "etc/containerd/config.toml"
    config.write_text("[plugins]\n")
    before = tree(root)
    _, complaint = node(root, "install", status=7)
    assert "version 1" in complaint
    assert "containerd config migrate" in complaint
    assert tree(root) == before
    config.unlink()
    _, complaint = node(root, "install", status=7)
    assert "no containerd on this node" in complaint
    assert "apt-get install containerd" in complaint
    _, complaint = node(root, "uninstall", status=3)
    assert "not installed" in complaint


def test_a_node_with_running_pods_is_not_uninstalled_by_accident(root: Path) -> None:
    node(root, "install")
    shims = root / "run/remora/shim"
    shims.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{os.open(shims, os.O_PATH)}/{'ab' * 32}")
        server.listen()
        _, complaint = node(root, "uninstall", status=7)
        assert "1 pods of the runtime are running" in complaint
        assert (root / SHIM).exists()
    node(root, "uninstall")  # a socket that nobody listens on is no pod
    assert not (root / SHIM).exists()


def test_a_restart_of_containerd_that_failed_is_made_up_for(root: Path) -> None:
    refusal, consent = b"Unit containerd.service not found.", b"/org/freedesktop/systemd1/job/1"
    systemd = FakeSystemd(root, error(refusal))
    _, complaint = node(root, "install", "--no-agent", status=10)
    systemd.close()
    assert refusal.decode() in complaint
    systemd = FakeSystemd(root, done(consent))
    second, _ = node(root, "install", "--no-agent")
    systemd.close()
    assert "restart" in actions(second)
    assert b"RestartUnit" in systemd.calls
    third, _ = node(root, "install", "--no-agent")
    assert actions(third) == {"keep"}
    systemd = FakeSystemd(root, done(consent), done(b""))
    last, _ = node(root, "uninstall")
    systemd.close()
    assert "restart" in actions(last)


def test_an_image_gives_the_node_the_shims_own_environment(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On a small image of a program that prints its arguments; the whole one is installed by tests/kubernetes."""
    image = tmp_path_factory.mktemp("image")
    for name in ("lib/python3.11", "share/guest", "site/remora"):
        (image / "usr" / name).mkdir(parents=True)
    (image / "usr/lib/python3.11/os.py").write_text("# the standard library\n")
    (image / "usr/share/guest/vmlinux").write_bytes(b"kernel")
    linker = os.path.realpath("/lib64/ld-linux-x86-64.so.2")
    (image / "usr/bin").mkdir()
    shutil.copy(linker, image / "usr/lib/ld.so")
    shutil.copy("/bin/echo", image / "usr/bin/python3.11")
    libraries = str(Path(linker).parent)
    (image / "usr/lib/c").symlink_to(libraries)
    for folder in ("", "wire", "client", "guest", "images"):
        (image / "usr/site/remora" / folder).mkdir(exist_ok=True)
    bundle = node_bundle.Bundle(
        id="1-abc",
        trees=("/usr/lib/python3.11", "/usr/site/remora", "/usr/lib/c"),
        programs={"python3": "/usr/bin/python3.11"},
        linker="/usr/lib/ld.so",
        libraries=("/usr/lib/c",),
        source="/usr/site",
        guest="/usr/share/guest",
        guest_digest="d" * 64,
    )
    before = tree(root)
    target = Node(root)
    node_bundle.install(target, bundle, image)
    target.write(node_bundle.guest_note(bundle, image))
    home = root / "opt/remora/1-abc"
    assert (home / "lib/python3.11/os.py").is_file()
    assert json.loads((root / "var/lib/remora/guest/current.json").read_text())["kernel"].endswith("d/vmlinux")
    # As on the node, whose root this is.
    script = (home / "bin/python3").read_text().replace("/opt/remora", f"{root}/opt/remora")
    ran = subprocess.run(
        ["sh", "-c", script.partition("\n")[2], "python3", "hello"], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "hello\n", ran.stderr
    again = Node(root)
    node_bundle.install(again, bundle, image)
    assert not again.changed
    for path in node_bundle.trees(bundle):
        again.remove_tree(path)
    again.remove("/var/lib/remora/guest/current.json")
    again.remove_directories(["/opt", "/opt/remora", "/var", "/var/lib", "/var/lib/remora", "/var/lib/remora/guest"])
    assert tree(root) == before
