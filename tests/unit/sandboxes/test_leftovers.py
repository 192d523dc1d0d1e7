"""The proof of no leftovers must itself find leftovers."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from remora.sandboxes.leftovers import find_leftovers


def test_nothing_is_found_for_a_directory_nobody_uses(tmp_path: Path) -> None:
    assert find_leftovers(tmp_path / "gone") == []


def test_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert find_leftovers(tmp_path) == [f"file {tmp_path}/state"]


def test_a_socket_is_found_while_it_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert f"socket {path}" in find_leftovers(tmp_path)
        path.unlink()


def test_a_process_is_found_by_its_arguments_and_by_its_environment(tmp_path: Path) -> None:
    wait = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    directory = tmp_path / "run"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([*wait, str(directory)], **pipes) as by_arguments,  # type: ignore[call-overload]
        subprocess.Popen(wait, env={"REMORA_RUNTIME_DIR": str(directory)}, **pipes) as by_environment,  # type: ignore[call-overload]
    ):
        for process in (by_arguments, by_environment):
            process.stdout.readline()
        found = "\n".join(find_leftovers(directory))
        assert f"process {by_arguments.pid}:" in found
        assert f"process {by_environment.pid}:" in found
    assert find_leftovers(directory) == []
