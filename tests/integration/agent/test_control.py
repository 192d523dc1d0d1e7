"""The control socket: attaching, detaching, and who may."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, wait_until
from remora.errors import AlreadyExistsError, InvalidArgumentError, RemoraError
from remora.wire import control_v1


def attachments(agent: AgentProcess) -> dict[str, control_v1.Attachment]:
    answer = agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
    return {entry.sandbox: entry for entry in answer.attachments}


def test_an_attached_sandbox_is_served_on_its_own_socket(agent: AgentProcess) -> None:
    path = agent.attach("box", tenant="team", labels={"pod": "p1"})
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    with Guest(agent.connect(path)) as guest:
        guest.infer("identity")
        entry = attachments(agent)["box"]
        assert (entry.tenant, dict(entry.labels), entry.connections, entry.sessions) == ("team", {"pod": "p1"}, 1, 1)
        assert entry.requests == 2
        agent.detach("box")
        assert not path.exists()
        with pytest.raises(RemoraError):
            guest.ping()
    assert "box" not in attachments(agent)


def test_attaching_twice_alike_is_no_work_and_otherwise_refused(agent: AgentProcess) -> None:
    agent.attach("twice", tenant="a")
    agent.attach("twice", tenant="a")
    with pytest.raises(AlreadyExistsError):
        agent.attach("twice", tenant="b")
    agent.detach("twice")


def test_detaching_what_is_not_attached_is_no_error(agent: AgentProcess) -> None:
    agent.detach("never-was")


def test_a_bad_attachment_is_refused_with_the_reason(agent: AgentProcess, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "channel.sock_2048").write_text("a file")
    for directory, sandbox, message in (
        (str(link), "x", "symlink"),
        ("relative", "x", "absolute"),
        (str(tmp_path / "none"), "x", "does not exist"),
        (str(tmp_path), "../x", "not a valid name"),
        (str(occupied), "x", "not a socket"),
        (f"/tmp/{'d' * 100}", "x", "does not exist"),
    ):
        request = control_v1.AttachRequest(sandbox=sandbox, directory=directory)
        with pytest.raises(RemoraError, match=message):
            agent.ask("Attach", request, control_v1.Empty)
    with pytest.raises(InvalidArgumentError, match="labels"):
        agent.attach("x", labels={str(number): "v" for number in range(100)})
    assert "x" not in attachments(agent)


def test_a_sandbox_whose_directory_vanishes_is_detached(agent: AgentProcess) -> None:
    path = agent.attach("vanishing")
    with Guest(agent.connect(path)) as guest:
        guest.ping()
        shutil.rmtree(path.parent)
        wait_until(lambda: "vanishing" not in attachments(agent), "the agent notices")
        with pytest.raises(RemoraError):
            guest.ping()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_use_the_control_socket(agent: AgentProcess) -> None:
    assert stat.S_IMODE(agent.control.lstat().st_mode) == 0o600
    script = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "os.chdir(os.path.dirname(sys.argv[1]))\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try:\n    sock.connect(os.path.basename(sys.argv[1]))\n"
        "except PermissionError:\n    sys.exit(7)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(agent.control)], check=False)
    assert result.returncode == 7
