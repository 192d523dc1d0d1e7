"""Bad input to commands: one clear line that says what to do, a status that is not zero, and the trace with --debug."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remora.bench.rig import Rig, agent

pytestmark = pytest.mark.timeout(120)


def remora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "remora", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The last line is the error, names what to do in brackets, and nothing looks like a trace."""
    assert done.returncode not in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("remora "), done.stderr
    assert line.endswith(")"), line
    for word in words:
        assert word in line, line


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with agent() as running:
        yield running


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"REMORA_STATE_DIR": str(tmp_path / "state"), "REMORA_RUNTIME_DIR": str(tmp_path / "run")}


def test_an_image_that_is_not_there(state: dict[str, str]) -> None:
    check_one_clear_line(remora("run", "nosuch", **state), "nosuch", "remora image")


def test_debug_shows_the_trace_of_the_same_error(state: dict[str, str]) -> None:
    done = remora("--debug", "run", "nosuch", **state)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_no_qemu_on_this_host_names_the_package(tmp_path: Path) -> None:
    (tmp_path / "true").symlink_to(str(shutil.which("true")))
    done = remora("run", "--no-accel", "classify", "true", PATH=str(tmp_path), REMORA_RUNTIME_DIR=str(tmp_path / "run"))
    check_one_clear_line(done, "qemu-system-x86")


def test_a_socket_that_another_agent_listens_on(rig: Rig, state: dict[str, str]) -> None:
    done = remora("agent", "--listen", rig.address, "--state", state["REMORA_STATE_DIR"], **state)
    check_one_clear_line(done, rig.address.removeprefix("unix://"))


def test_a_port_that_is_in_use(state: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = remora("agent", "--listen", f"tcp://127.0.0.1:{port}", "--state", state["REMORA_STATE_DIR"], **state)
    check_one_clear_line(done, str(port))


def test_a_port_for_everybody_is_refused(state: dict[str, str]) -> None:
    done = remora("agent", "--listen", "tcp://0.0.0.0:4711", "--state", state["REMORA_STATE_DIR"], **state)
    check_one_clear_line(done, "0.0.0.0", "loopback")


def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    check_one_clear_line(remora("ping", "--address", f"unix://{tmp_path}/none.sock"), "remora agent")


def test_a_picture_that_is_no_picture(rig: Rig, tmp_path: Path) -> None:
    fake = tmp_path / "letter.jpg"
    fake.write_text("Dear Sir or Madam")
    check_one_clear_line(remora("classify", "--address", rig.address, str(fake)), "JPEG")


def test_a_picture_that_does_not_exist(rig: Rig) -> None:
    check_one_clear_line(remora("classify", "--address", rig.address, "/nowhere/x.jpg"), "/nowhere/x.jpg")


def test_a_model_that_the_catalogue_does_not_have(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff")
    done = remora("classify", "--address", rig.address, "--model", "nosuch", str(tmp_path / "x.jpg"))
    check_one_clear_line(done, "nosuch")


def test_a_manifest_with_a_wrong_key(state: dict[str, str]) -> None:
    models = Path(state["REMORA_STATE_DIR"]) / "models"
    models.mkdir(parents=True)
    (models / "mine.toml").write_text('name = "mine"\ntusk = "tensor"\n')
    check_one_clear_line(remora("models", "list", **state), "mine.toml", "tusk")


def test_an_archive_that_is_no_image(state: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    check_one_clear_line(remora("image", "import", str(tmp_path / "x.tar"), **state), "x.tar")


def test_a_function_directory_without_a_recipe(state: dict[str, str], tmp_path: Path) -> None:
    check_one_clear_line(remora("image", "build", str(tmp_path), **state), "remora.toml")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    try:
        done = remora("models", "build", "efficientnet-lite0", REMORA_STATE_DIR=str(small))
        check_one_clear_line(done, str(small))
        assert not list((small / "models").glob("*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
