"""A sandbox stays attached to the agent, whatever becomes of the agent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import AgentProcess, running_agent, wait_until
from remora.errors import UnavailableError
from remora.sandboxes.agent_link import AgentLink, detach
from remora.sandboxes.launch import AttachSpec
from remora.wire import control_v1


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    (tmp_path / "models").mkdir()
    with running_agent(tmp_path) as agent:
        yield agent


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "sandbox"
    directory.mkdir(mode=0o700)
    return directory


def attached(agent: AgentProcess) -> list[tuple[str, str]]:
    answer = agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
    return [(each.sandbox, each.tenant) for each in answer.attachments]


def test_a_sandbox_is_attached_and_detached(agent: AgentProcess, directory: Path) -> None:
    link = AgentLink(AttachSpec(agent.control, tenant="blue"), "lamp", directory)
    link.attach()
    assert attached(agent) == [("lamp", "blue")]
    assert (directory / "channel.sock_2048").is_socket()
    link.close(detach_sandbox=True)
    assert attached(agent) == []
    detach(agent.control, "lamp")


def test_it_is_attached_again_when_the_agent_was_killed_and_is_back(agent: AgentProcess, directory: Path) -> None:
    link = AgentLink(AttachSpec(agent.control), "lamp", directory)
    link.attach()
    agent.kill()
    agent.start()
    wait_until(lambda: attached(agent) == [("lamp", "lamp")], "attached again")
    link.close(detach_sandbox=True)
    wait_until(lambda: attached(agent) == [], "detached")


def test_without_an_agent_it_says_how_to_start_one_and_attaches_when_there_is_one(
    agent: AgentProcess, directory: Path
) -> None:
    agent.stop()
    link = AgentLink(AttachSpec(agent.control), "lamp", directory)
    with pytest.raises(UnavailableError) as caught:
        link.attach()
    assert "remora agent" in str(caught.value.fix)
    agent.start()
    wait_until(lambda: attached(agent) == [("lamp", "lamp")], "attached at last")
    link.close(detach_sandbox=True)


def test_closing_without_an_agent_does_not_wait(agent: AgentProcess, directory: Path) -> None:
    link = AgentLink(AttachSpec(agent.control), "lamp", directory)
    link.attach()
    agent.kill()
    began_s = time.monotonic()
    link.close(detach_sandbox=True)
    assert time.monotonic() - began_s < 2
    agent.start()


def state_grant(agent: AgentProcess, number: int) -> str:
    grant = control_v1.GrantRequest(id=f"{number:032x}", kind="gpu", shares=[f"gpu0-{number}"], shares_per_device=10)
    agent.ask("Grant", grant, control_v1.Empty)
    return grant.id


def granted(agent: AgentProcess) -> list[str]:
    answer = agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
    return [f"{one.kind} {one.shares}/{one.shares_per_device}" for each in answer.attachments for one in each.grants]


def test_further_containers_bring_further_grants_and_an_agent_that_comes_back_knows_all(
    agent: AgentProcess, directory: Path
) -> None:
    ids = [state_grant(agent, number) for number in range(3)]
    link = AgentLink(AttachSpec(agent.control, labels=(("uid", "u-1"),), grants=(ids[0],)), "lamp", directory)
    link.attach()
    assert granted(agent) == ["gpu 1/10"]
    link.grant((ids[0], ids[1]))
    assert granted(agent) == ["gpu 2/10"]
    agent.kill()
    with contextlib.suppress(UnavailableError):
        link.grant((ids[2],))  # while it is away
    agent.start()
    wait_until(lambda: granted(agent) == ["gpu 3/10"], "all grants are told")
    link.close(detach_sandbox=True)
