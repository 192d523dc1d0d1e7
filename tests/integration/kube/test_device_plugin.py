"""The device plugin beside a kubelet: registration, health, allocation, and a kubelet that restarts."""

from __future__ import annotations

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
from remora.kube.plugin import DevicePlugin
from remora.kube.shares import Resource

ENDPOINT = "remora-gpu.sock"


class Agent:
    serving = True


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def plugin(tmp_path: Path, agent: Agent) -> Iterator[DevicePlugin]:
    plugin = DevicePlugin(Resource("gpu", 2, 3), tmp_path, lambda: agent.serving, interval_s=0.05)
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


def test_a_grant_names_its_shares_for_each_container(kubelet: Kubelet) -> None:
    kubelet.registrations.get(timeout=10)
    first, second = kubelet.allocate(ENDPOINT, ["gpu1-0", "gpu0-2"], ["gpu0-0"]).container_responses
    assert first.annotations == {"grant.remora.dev/gpu": "gpu0-2,gpu1-0"}
    assert first.envs == {"REMORA_GRANT_GPU": "2/3"}
    assert second.annotations == {"grant.remora.dev/gpu": "gpu0-0"}


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
        assert process.wait(10) == 0
        assert not (tmp_path / "remora-cpu.sock").exists()
    finally:
        process.kill()
        process.wait()
        kubelet.close()
