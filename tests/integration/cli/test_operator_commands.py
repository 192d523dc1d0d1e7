"""`remora top`, `sessions`, `resources`, `workers` and `models` against a real agent, as an operator uses them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, running_agent
from remora.errors import RemoraError
from remora.wire import control_v1


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("op"), models=catalogue_directory()) as running:
        yield running


@pytest.fixture(scope="module")
def upload() -> bytes:
    return (catalogue_directory() / "identity" / "model.onnx").read_bytes()


def remora(agent: AgentProcess, *arguments: str) -> str:
    command = [sys.executable, "-m", "remora", *arguments, "--control", str(agent.control)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(agent: AgentProcess, *arguments: str) -> Any:
    return json.loads(remora(agent, *arguments, "--json"))


def test_sessions_resources_models_and_workers_are_listed(agent: AgentProcess, upload: bytes) -> None:
    digest = f"sha256:{hashlib.sha256(upload).hexdigest()}"
    socket = agent.attach("web", tenant="shop")
    with Guest(agent.connect(socket)) as guest, Guest(agent.connect()) as local:
        guest.upload(digest, upload)
        guest.load(digest)
        guest.infer(digest)
        local.infer("identity")
        sessions = {entry["id"]: entry for entry in rows(agent, "sessions")}
        mine = sessions[guest.hello.session_id]
        assert (mine["tenant"], mine["owner"], mine["models"]) == ("tenant:shop", "sandbox:web", [digest])
        assert (mine["connections"], mine["resources"], mine["lease_s"]) == (1, 1, 0)
        only = rows(agent, "sessions", "--tenant", "tenant:shop")
        assert [entry["id"] for entry in only] == [guest.hello.session_id]
        (resource,) = rows(agent, "resources")
        assert (resource["digest"], resource["tenant"]) == (digest, "tenant:shop")
        assert (resource["size_bytes"], resource["sessions"], resource["loaded"]) == (len(upload), 1, True)
        loaded = {(entry["name"], entry["domain"]): entry for entry in rows(agent, "models", "loaded")}
        assert loaded[digest, "tenant:shop"]["sessions"] == 1
        assert loaded["identity", "shared"]["device"] == "cpu"
        workers = {entry["domain"]: entry for entry in rows(agent, "workers")}
        assert {"shared", "tenant:shop"} <= workers.keys()
        assert workers["shared"]["memory_bytes"] > 10_000_000
        for arguments, heading in (
            (("sessions",), "SESSION"),
            (("resources",), "DIGEST"),
            (("workers",), "WORKER"),
            (("models", "loaded"), "MODEL"),
        ):
            shown = remora(agent, *arguments)
            assert shown.startswith(heading)
            assert "shop" in shown
    token = guest.token.hex()
    assert token not in remora(agent, "sessions", "--json")
    agent.detach("web")


def test_the_catalogue_shows_what_is_loaded_where_an_agent_runs(agent: AgentProcess, tmp_path: Path) -> None:
    with Guest(agent.connect()) as guest:
        guest.infer("identity")
    found = {entry["name"]: entry for entry in rows(agent, "models", "list")}
    assert found["identity"]["loaded"] is True
    assert found["identity"]["requests"] >= 1
    assert "cpu" in remora(agent, "models", "list")
    command = [sys.executable, "-m", "remora", "models", "list", "--json", "--control", str(tmp_path / "none")]
    without = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "loaded" not in without[0]


def test_many_sessions_come_page_by_page(agent: AgentProcess) -> None:
    guests = [Guest(agent.connect(agent.attach(f"page{number}"))) for number in range(2)]
    page = control_v1.PageRequest(limit=1)
    answer = agent.ask("Sessions", page, control_v1.SessionsResponse)
    assert len(answer.sessions) == 1
    assert len(rows(agent, "sessions")) >= 2
    for number, guest in enumerate(guests):
        guest.close()
        agent.detach(f"page{number}")


def test_top_prints_once_into_a_pipe(agent: AgentProcess) -> None:
    with Guest(agent.connect()) as guest:
        command = [sys.executable, "-m", "remora", "top", "--interval", "1", "--control", str(agent.control)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            guest.infer("identity")
            with contextlib.suppress(RemoraError):
                guest.infer("none")
        assert process.stdout is not None
        shown = process.stdout.read()
        process.stdout.close()
        load = rows(agent, "top", "--interval", "0.1")
    assert process.returncode == 0
    for part in ("remora agent", "serving", "TENANT", f"uid:{os.geteuid()}", "identity", "cpu", "REFUSED/S"):
        assert part in shown
    assert load["pid"] == agent.pid
    assert {"tenants", "models", "devices", "workers"} <= load.keys()


@pytest.mark.parametrize("how", ["q", "ctrl-c", "sigterm"])
def test_top_on_a_terminal_leaves_it_as_it_was(agent: AgentProcess, how: str) -> None:
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "remora", "top", "--interval", "0.2", "--control", str(agent.control)]

    def own_terminal() -> None:
        os.setsid()
        import fcntl

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal, env=environment
    )
    output = b""

    def read_until(part: bytes) -> None:
        nonlocal output
        deadline_s = time.monotonic() + 20
        while part not in output:
            assert time.monotonic() < deadline_s, output[-2000:]
            if select.select([master], [], [], 0.1)[0]:
                output += os.read(master, 65536)

    try:
        read_until(b"TENANT")
        if how == "sigterm":
            process.send_signal(signal.SIGTERM)
        else:
            os.write(master, b"q" if how == "q" else b"\x03")
        read_until(b"\x1b[?1049l")  # the alternate screen is left
        read_until(b"\x1b[?25h")  # and the cursor is there again
        assert process.wait(10) == 0
        assert termios.tcgetattr(slave) == before
        assert b"Traceback" not in output
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("arguments", [["top"], ["sessions"], ["resources"], ["workers"], ["models", "loaded"]])
def test_without_an_agent_it_is_one_line_with_the_fix(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remora", *arguments, "--control", str(tmp_path / "none.sock")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 10
    assert result.stderr.count("\n") == 1
    assert "start one with `remora agent`" in result.stderr


def test_an_interval_that_is_none_is_refused(agent: AgentProcess) -> None:
    command = [sys.executable, "-m", "remora", "top", "--interval", "0", "--control", str(agent.control)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--interval 0" in result.stderr


def test_a_tenant_cannot_ask_on_its_own_socket(agent: AgentProcess) -> None:
    """(That no other user can open the control socket is in agent/test_control.)"""
    with Guest(agent.connect()) as guest, pytest.raises(RemoraError, match="no service"):
        guest._client.call(control_v1.SERVICE, "Sessions", control_v1.PageRequest(), control_v1.SessionsResponse)
