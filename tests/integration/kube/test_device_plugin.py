"""The device plugin beside a kubelet: registration, health, allocation, and a kubelet that restarts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kubelet_registry import Kubelet
from remora.errors import UnavailableError
from remora.kube import plugin as plugin_module
from remora.kube.plugin import DevicePlugin
from remora.kube.shares import Resource
from remora.wire import control_v1

ENDPOINT = "remora-gpu.sock"


class Agent:
    """What the plugin asks of an agent."""

    def __init__(self) -> None:
        self.serving = True
        self.away = False
        self.grants: list[control_v1.GrantRequest] = []

    def state(self, grant: control_v1.GrantRequest) -> None:
        if self.away:
            raise UnavailableError("no agent answers")
        self.grants.append(grant)


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def plugin(tmp_path: Path, agent: Agent) -> Iterator[DevicePlugin]:
    plugin = DevicePlugin(Resource("gpu", 2, 3), tmp_path, lambda: agent.serving, agent.state, interval_s=0.05)
    thread = threading.Thread(target=plugin.run)
    thread.start()
    yield plugin
    plugin.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert not (tmp_path / ENDPOINT).exists()


@pytest.fixture
def kubelet(tmp_path: Path, plugin: DevicePlugin) -> Iterator[Kubelet]:
    """It comes after the plugin, which waits for it."""
    kubelet = Kubelet(tmp_path)
    yield kubelet
    kubelet.close()


def test_it_registers_and_lists_every_share_as_healthy(kubelet: Kubelet) -> None:
    request = kubelet.registrations.get(timeout=10)
    assert (request.version, request.endpoint, request.resource_name) == ("v1beta1", ENDPOINT, "remora.dev/gpu")
    devices = next(kubelet.watch(ENDPOINT)).devices
    assert [device.id for device in devices] == ["gpu0-0", "gpu0-1", "gpu0-2", "gpu1-0", "gpu1-1", "gpu1-2"]
    assert {device.health for device in devices} == {"Healthy"}


def test_shares_are_unhealthy_within_two_seconds_of_the_agents_end_and_healthy_again(
    kubelet: Kubelet, agent: Agent
) -> None:
    kubelet.registrations.get(timeout=10)
    stream = kubelet.watch(ENDPOINT)
    next(stream)
    for serving, health in ((False, "Unhealthy"), (True, "Healthy")):
        agent.serving, began_s = serving, time.monotonic()
        assert {device.health for device in next(stream).devices} == {health}
        assert time.monotonic() - began_s < 2


def test_each_container_gets_a_grant_of_its_own_that_the_agent_knows_by_then(kubelet: Kubelet, agent: Agent) -> None:
    kubelet.registrations.get(timeout=10)
    first, second = kubelet.allocate(ENDPOINT, ["gpu1-0", "gpu0-2"], ["gpu0-0"]).container_responses
    assert [(grant.kind, list(grant.shares), grant.shares_per_device) for grant in agent.grants] == [
        ("gpu", ["gpu1-0", "gpu0-2"], 3),
        ("gpu", ["gpu0-0"], 3),
    ]
    assert first.annotations == {"grant.remora.dev/gpu": agent.grants[0].id}
    assert first.envs == {"REMORA_GRANT_GPU": "2/3"}
    assert second.annotations == {"grant.remora.dev/gpu": agent.grants[1].id}
    ids = [grant.id for grant in agent.grants]
    assert len({*ids}) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in ids)
    assert not any(one in text for one in ids for text in (*first.envs.values(), *second.envs.values()))


def test_a_container_without_shares_gets_no_grant(kubelet: Kubelet, agent: Agent) -> None:
    kubelet.registrations.get(timeout=10)
    (answer,) = kubelet.allocate(ENDPOINT, []).container_responses
    assert (dict(answer.annotations), dict(answer.envs), agent.grants) == ({}, {}, [])


def test_an_allocation_waits_for_an_agent_that_is_being_restarted(kubelet: Kubelet, agent: Agent) -> None:
    kubelet.registrations.get(timeout=10)
    agent.away = True
    back = threading.Timer(0.5, lambda: setattr(agent, "away", False))
    back.start()
    try:
        (answer,) = kubelet.allocate(ENDPOINT, ["gpu0-0"]).container_responses
    finally:
        back.join()
    assert answer.annotations["grant.remora.dev/gpu"] == agent.grants[0].id


def test_an_allocation_that_the_agent_never_hears_of_fails(
    kubelet: Kubelet, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_module, "_AGENT_S", 0.3)
    kubelet.registrations.get(timeout=10)
    agent.away = True
    with pytest.raises(grpc.RpcError) as refused:
        kubelet.allocate(ENDPOINT, ["gpu0-0"])
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_kubelet_is_told_which_shares_to_prefer(kubelet: Kubelet) -> None:
    request = kubelet.registrations.get(timeout=10)
    assert request.options is not None
    assert request.options.get_preferred_allocation_available
    assert kubelet.options(ENDPOINT).get_preferred_allocation_available
    available = ["gpu0-0", "gpu0-1", "gpu0-2", "gpu1-2"]
    assert kubelet.prefer(ENDPOINT, available, 1) == ["gpu1-2"]
    assert kubelet.prefer(ENDPOINT, available, 2) == ["gpu0-0", "gpu0-1"]
    assert kubelet.prefer(ENDPOINT, available, 2, ["gpu1-2"]) == ["gpu0-0", "gpu1-2"]
    with pytest.raises(grpc.RpcError) as refused:
        kubelet.prefer(ENDPOINT, ["gpu0-0"], 2)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("ids", [["gpu9-9"], ["gpu0-0", "gpu0-0"], ["../etc"], [""]])
def test_a_share_that_does_not_exist_or_comes_twice_is_refused(kubelet: Kubelet, ids: list[str]) -> None:
    kubelet.registrations.get(timeout=10)
    with pytest.raises(grpc.RpcError) as refused:
        kubelet.allocate(ENDPOINT, ids)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_it_registers_again_with_a_kubelet_that_restarts(kubelet: Kubelet, tmp_path: Path) -> None:
    kubelet.registrations.get(timeout=10)
    for _ in range(2):
        kubelet.close()
        kubelet = Kubelet(tmp_path)
        assert kubelet.registrations.get(timeout=10).resource_name == "remora.dev/gpu"
        assert len(next(kubelet.watch(ENDPOINT)).devices) == 6
    kubelet.close()


def test_the_command_advertises_unhealthy_shares_without_an_agent_and_ends_on_sigterm(tmp_path: Path) -> None:
    kubelet = Kubelet(tmp_path)
    command = ["node", "plugin", "--cpus", "1", "--kubelet", str(tmp_path), "--control", str(tmp_path / "none")]
    process = subprocess.Popen([sys.executable, "-m", "remora", *command], stderr=subprocess.DEVNULL)
    try:
        assert kubelet.registrations.get(timeout=20).resource_name == "remora.dev/cpu"
        devices = next(kubelet.watch("remora-cpu.sock")).devices
        assert (len(devices), {device.health for device in devices}) == (10, {"Unhealthy"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not (tmp_path / "remora-cpu.sock").exists()
    finally:
        process.kill()
        process.wait()
        kubelet.close()
