"""An agent that drains answers what it began, takes nothing new, and ends well; a policy changes while it runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, identity_request, wait_until
from remora.errors import PermissionDeniedError, UnavailableError
from remora.wire import control_v1, remora_v1

_PICTURE = remora_v1.Tensor(name="input", dtype="float32", shape=[1, 3, 224, 224], data=bytes(602112))
REQUEST = remora_v1.InferRequest(model="efficientnet-lite0", inputs=[_PICTURE])


def started(directory: Path, config: str = "") -> AgentProcess:
    agent = AgentProcess(directory, config=config, models=catalogue_directory())
    agent.start()
    return agent


@pytest.mark.parametrize("how", ["command", "signal"])
def test_a_draining_agent_finishes_what_runs_and_refuses_what_is_new(tmp_path: Path, how: str) -> None:
    agent = started(tmp_path)
    answered: list[bool] = []
    refused: list[Exception] = []
    drained: list[int] = []
    try:
        with Guest(agent.connect()) as guest:
            guest.call("Infer", REQUEST, remora_v1.InferResponse)

            def work() -> None:
                try:
                    guest.call("Infer", REQUEST, remora_v1.InferResponse)
                    answered.append(True)
                except UnavailableError as error:
                    refused.append(error)

            threads = [threading.Thread(target=work) for _ in range(60)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(answered) >= 2, "the first answers")
            if how == "signal":
                os.kill(agent.pid, signal.SIGTERM)
            else:
                request = control_v1.DrainRequest(timeout_s=30)
                drainer = threading.Thread(
                    target=lambda: drained.append(agent.ask("Drain", request, control_v1.DrainResponse).given_up)
                )
                drainer.start()
                threads.append(drainer)
            wait_until(lambda: "agent draining" in agent.log, "the drain begins")
            with pytest.raises((UnavailableError, OSError)):  # OSError: it has ended meanwhile
                Guest(agent.connect())
            for thread in threads:
                thread.join(30)
        wait_until(lambda: not agent.alive(), "the agent ends")
    finally:
        status = agent.stop()
    assert status == 0, agent.log
    assert len(answered) + len(refused) == 60, agent.log
    # What was sent while it drained is refused in words; what came after it had ended found nobody. A client of the SDK
    # sends both again to the next agent.
    assert all("draining" in str(error) or "connection" in str(error) for error in refused), refused
    assert drained == ([0] if how == "command" else [])


def test_a_reload_applies_to_open_connections_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    agent = started(tmp_path)
    config = tmp_path / "agent.toml"
    try:
        with Guest(agent.connect()) as guest:
            guest.infer("identity")
            config.write_text('[defaults]\nmodels = ["other"]\n')
            os.kill(agent.pid, signal.SIGHUP)
            wait_until(lambda: "policy reloaded" in agent.log, "the policy is reloaded")
            with pytest.raises(PermissionDeniedError, match=r"rule \[defaults\] models"):
                guest.call("Infer", identity_request("identity"), remora_v1.InferResponse)
            with pytest.raises(PermissionDeniedError):
                guest.load("identity")
            config.write_text("[defaults]\nmodels = 3\n")
            os.kill(agent.pid, signal.SIGHUP)
            wait_until(lambda: "policy refused" in agent.log, "the broken file is refused")
            assert agent.ask("Policy", control_v1.Empty(), control_v1.PolicyResponse).refused
            with pytest.raises(PermissionDeniedError):
                guest.infer("identity")
    finally:
        began_s = time.monotonic()
        assert agent.stop() == 0
    assert time.monotonic() - began_s < 5
