"""An agent that drains answers what it began, takes nothing new, and ends well; a policy changes while it runs."""

from __future__ import annotations

import hashlib
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


def test_with_watch_an_exchanged_file_is_the_policy_without_a_signal(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    agent.start("--watch")
    try:
        with Guest(agent.connect()) as guest:
            guest.infer("identity")
            draft = tmp_path / "new.toml"
            draft.write_text('[defaults]\nmodels = ["other"]\n')
            draft.rename(tmp_path / "agent.toml")
            wait_until(lambda: "policy reloaded" in agent.log, "the policy is reloaded")
            with pytest.raises(PermissionDeniedError, match=r"rule \[defaults\] models"):
                guest.call("Infer", identity_request("identity"), remora_v1.InferResponse)
    finally:
        agent.stop()


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


def drain(agent: AgentProcess, timeout_s: float, given_up: list[int]) -> threading.Thread:
    """Begin to drain; the thread ends with the agent's answer in `given_up`."""
    request = control_v1.DrainRequest(timeout_s=timeout_s)
    thread = threading.Thread(
        target=lambda: given_up.append(agent.ask("Drain", request, control_v1.DrainResponse).given_up)
    )
    thread.start()
    wait_until(lambda: "agent draining" in agent.log, "the drain begins")
    return thread


def test_a_drain_waits_for_an_upload_that_is_coming_in(tmp_path: Path) -> None:
    agent = started(tmp_path)
    given_up: list[int] = []
    data = [os.urandom(100_000) for _ in range(3)]
    digest = "sha256:" + hashlib.sha256(b"".join(data)).hexdigest()
    total = sum(map(len, data))
    try:
        with Guest(agent.connect()) as guest:

            def put(index: int) -> remora_v1.PutResourceResponse:
                offset = sum(map(len, data[:index]))
                request = remora_v1.PutResourceRequest(
                    digest=digest, offset=offset, total_bytes=total, data=data[index]
                )
                return guest.call("PutResource", request, remora_v1.PutResourceResponse)

            put(0)
            thread = drain(agent, 30, given_up)
            put(1)
            assert put(2).complete
        thread.join(10)
        assert given_up == [0]
    finally:
        assert agent.stop() == 0, agent.log


@pytest.mark.parametrize("door", ["native", "oip"])
def test_a_drain_waits_for_half_a_message_until_its_time_is_over(tmp_path: Path, door: str) -> None:
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    oip = tmp_path / "oip.sock"
    agent.start("--listen", f"oip+unix://{oip}")
    given_up: list[int] = []
    try:
        with agent.connect(oip if door == "oip" else None) as sock:
            half = (
                b"POST /v2/models/identity/infer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{" if door == "oip" else b"\0\0"
            )
            sock.sendall(half)
            with agent.connect(oip) as other:  # the agent has seen what came before this is answered
                other.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" in other.recv(4096)
                thread = drain(agent, 0.5, given_up)
                other.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"503" in other.recv(4096)
            thread.join(10)
        assert given_up == [1]
        wait_until(lambda: not agent.alive(), "the agent ends")
    finally:
        assert agent.stop() == 0, agent.log


def test_a_reload_under_load_drops_no_request(tmp_path: Path) -> None:
    agent = started(tmp_path)
    config = tmp_path / "agent.toml"
    answered, stop = [0] * 4, threading.Event()
    wrong: list[Exception] = []

    def work(index: int) -> None:
        try:
            with Guest(agent.connect()) as guest:
                while not stop.is_set():
                    guest.infer("identity", float(answered[index]))
                    answered[index] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(answered))]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            config.write_text(f"[defaults]\nconcurrent_requests = {1 + number % 3}\nqueue_length = {50 + number}\n")
            before = sum(answered)
            os.kill(agent.pid, signal.SIGHUP)
            wait_until(lambda n=number: agent.log.count("policy reloaded") > n, "the reload")  # type: ignore[misc]
            wait_until(lambda n=before: sum(answered) > n + 4 or wrong, "answers after it")  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        assert agent.stop() == 0, agent.log
    assert wrong == []
    assert "request refused" not in agent.log
