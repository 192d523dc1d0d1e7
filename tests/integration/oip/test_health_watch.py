"""`grpc.health.v1.Health/Watch` with a stock gRPC client: told at once, told of each change, ended with the agent."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, catalogue_directory, wait_until
from remora.wire import control_v1, health_v1

grpc = pytest.importorskip("grpc", reason="grpcio is missing: pip install remora[kube]")

WATCH = f"/{health_v1.SERVICE}/Watch"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"
OIP = b"\x0a\x1einference.GRPCInferenceService"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path, models=catalogue_directory())
    agent.start("--listen", f"oip+unix://{tmp_path}/oip.sock")
    yield agent
    assert agent.stop() == 0, agent.log[-2000:]
    assert "internal error" not in agent.log, agent.log[-3000:]


@pytest.fixture
def channel(agent: AgentProcess) -> Iterator[Any]:
    with grpc.insecure_channel(f"unix:{agent.directory}/oip.sock") as made:
        yield made


def test_a_watcher_is_told_how_it_is_and_of_the_drain_and_does_not_keep_the_agent(
    agent: AgentProcess, channel: Any
) -> None:
    told: queue.Queue[Any] = queue.Queue()

    def watch(request: bytes) -> None:
        try:
            for answer in channel.unary_stream(WATCH)(request, timeout=60):
                told.put(answer)
        except grpc.RpcError as error:
            told.put(error.code())

    threads = [threading.Thread(target=watch, args=(request,)) for request in (b"", OIP)]
    for thread in threads:
        thread.start()
    assert [told.get(timeout=10) for _ in threads] == [SERVING] * 2
    with agent.connect() as sock:
        sock.sendall(b"\0\0")  # half a message, for which the drain waits
        drained: list[int] = []
        request = control_v1.DrainRequest(timeout_s=3)
        drain = threading.Thread(
            target=lambda: drained.append(agent.ask("Drain", request, control_v1.DrainResponse).given_up)
        )
        drain.start()
        assert [told.get(timeout=10) for _ in threads] == [NOT_SERVING] * 2
        drain.join(20)
    assert drained == [1], "the watchers are not what is waited for"
    assert [told.get(timeout=20) for _ in threads] == [grpc.StatusCode.UNAVAILABLE] * 2
    for thread in threads:
        thread.join(10)
    wait_until(lambda: not agent.alive(), "the agent ends")


def test_a_watcher_of_what_is_not_here_is_told_so_and_may_stay(channel: Any) -> None:
    answers = channel.unary_stream(WATCH)(b"\x0a\x04nope", timeout=30)
    assert next(answers) == SERVICE_UNKNOWN
    answers.cancel()
    assert channel.unary_unary(f"/{health_v1.SERVICE}/Check")(OIP, timeout=10) == SERVING


def test_watchers_that_leave_are_forgotten_and_many_of_them_are_served_beside_calls(channel: Any) -> None:
    for _ in range(3):
        watchers = [channel.unary_stream(WATCH)(b"", timeout=30) for _ in range(50)]
        assert all(next(watcher) == SERVING for watcher in watchers)
        assert channel.unary_unary(f"/{health_v1.SERVICE}/Check")(b"", timeout=10) == SERVING
        for watcher in watchers:
            watcher.cancel()


def test_a_request_to_watch_that_is_too_large_is_refused(channel: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        next(channel.unary_stream(WATCH)(b"\x0a\xff\x7f" + 16383 * b"x", timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_successor_of_an_agent_has_its_watchers(agent: AgentProcess, tmp_path: Path) -> None:
    """A handover ends the watchers of the old agent, so that it can end itself; they come back to the next one."""
    with grpc.insecure_channel(f"unix:{agent.directory}/oip.sock") as channel:
        answers = channel.unary_stream(WATCH)(b"", timeout=60)
        assert next(answers) == SERVING
        old = agent.release()
        agent.start("--takeover", "--listen", f"oip+unix://{tmp_path}/oip.sock")
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert old.wait(20) == 0
        assert next(channel.unary_stream(WATCH)(b"", wait_for_ready=True, timeout=30)) == SERVING
