"""From the kubelet's Allocate to what a pod may use: the plugin as a process, a real agent, sandboxes in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from kubelet_registry import Kubelet
from remora.errors import PermissionDeniedError, RemoraError, ResourceExhaustedError
from remora.wire import control_v1

ENDPOINT = "remora-cpu.sock"
#: A rate so small that a few operations use it up.
SHARES = 10000
CONFIG = '[tenant."careful"]\nrequire_grant = ["*"]\n'


@dataclass
class Node:
    agent: AgentProcess
    kubelet: Kubelet

    def allocate(self, *shares: str) -> str:
        """Have the kubelet give shares to a container; return the annotation that it gets."""
        (answer,) = self.kubelet.allocate(ENDPOINT, list(shares)).container_responses
        return answer.annotations["grant.remora.dev/cpu"]

    def attach(self, name: str, *grants: str, tenant: str = "") -> Path:
        labels = {"namespace": "prod", "pod": name, "uid": f"uid-of-{name}"}
        return self.agent.attach(name, tenant=tenant, labels=labels, grants=list(grants))

    def granted(self, name: str) -> list[str]:
        answer = self.agent.ask("Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
        return [
            f"{one.kind} {one.shares}/{one.shares_per_device}"
            for each in answer.attachments
            if each.sandbox == name
            for one in each.grants
        ]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    agent = AgentProcess(tmp_path, config=CONFIG, models=catalogue_directory())
    agent.start()
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    kubelet = Kubelet(plugins)
    command = ["node", "plugin", "--cpus", "1", "--shares", str(SHARES), "--kubelet", str(plugins)]
    with (tmp_path / "plugin.log").open("wb") as log:
        plugin = subprocess.Popen(
            [sys.executable, "-m", "remora", *command, "--control", str(agent.control)], stderr=log, env=os.environ
        )
    try:
        kubelet.registrations.get(timeout=30)
        yield Node(agent, kubelet)
    finally:
        plugin.send_signal(signal.SIGTERM)
        status = plugin.wait(15)
        kubelet.close()
        agent.stop()
    assert status == 0, (tmp_path / "plugin.log").read_text()
    assert "internal error" not in agent.log


def use(path: Path, agent: AgentProcess, times: int) -> None:
    with Guest(agent.connect(path)) as guest:
        for _ in range(times):
            guest.infer("identity")


def test_a_pod_with_a_grant_gets_its_device_time_and_no_more(node: Node) -> None:
    path = node.attach("web", node.allocate("cpu0-0"))
    assert node.granted("web") == [f"cpu 1/{SHARES}"]
    with pytest.raises(ResourceExhaustedError) as refused:
        use(path, node.agent, 1000)  # a ten-thousandth of a second per second
    assert "1 shares of remora.dev/cpu" in refused.value.message
    assert "[grant.cpu] device_s_per_s" in refused.value.message
    wait_until(lambda: "give the pod more shares of remora.dev/cpu" in node.agent.log, "the operator is told")
    use(node.attach("other"), node.agent, 50)  # without a grant policy alone decides


def test_the_operator_sees_who_has_what(node: Node) -> None:
    node.attach("web", node.allocate("cpu0-0", "cpu0-1"))
    node.attach("other")
    command = [sys.executable, "-m", "remora", "grants", "--control", str(node.agent.control)]
    shown = subprocess.run([*command, "--json"], capture_output=True, check=True, text=True).stdout
    (row,) = json.loads(shown)
    assert {"namespace": "prod", "pod": "web", "kind": "cpu", "shares": 2}.items() <= row.items()
    assert row["device_s_per_s"] == pytest.approx(0.0002)
    table = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "2 of 10000 per device" in table


def test_enough_shares_let_everything_through(node: Node) -> None:
    shares = [f"cpu0-{number}" for number in range(SHARES)]
    use(node.attach("web", node.allocate(*shares)), node.agent, 50)


def test_what_policy_keeps_for_grants_is_refused_without_one_and_open_with_one(node: Node) -> None:
    with pytest.raises(PermissionDeniedError) as refused:
        use(node.attach("poor", tenant="careful"), node.agent, 1)
    assert "require_grant" in refused.value.message
    forged = node.attach("thief", "0" * 32, "cpu0-5", tenant="careful")
    with pytest.raises(PermissionDeniedError):
        use(forged, node.agent, 1)
    assert "no such grant was stated" in node.agent.log
    use(node.attach("rich", node.allocate("cpu0-1", "cpu0-2"), tenant="careful"), node.agent, 1)


def test_another_pods_grant_is_of_no_use_to_a_thief(node: Node) -> None:
    grant = node.allocate("cpu0-0")
    node.attach("web", grant)
    node.attach("thief", grant)
    assert (node.granted("web"), node.granted("thief")) == ([f"cpu 1/{SHARES}"], [])
    assert "it is the grant of another pod" in node.agent.log


def test_a_killed_agent_knows_the_grants_again_and_the_kubelet_waits_for_it(node: Node) -> None:
    waiting, held = node.allocate("cpu0-0"), node.allocate("cpu0-1")
    node.attach("web", held)
    node.agent.kill()
    back = threading.Timer(0.7, node.agent.start)
    back.start()
    try:
        late = node.allocate("cpu0-2")
    finally:
        back.join()
    assert node.granted("web") == [f"cpu 1/{SHARES}"]
    node.attach("two", waiting, late)
    assert node.granted("two") == [f"cpu 2/{SHARES}"]


def test_shares_of_a_pod_that_is_gone_are_its_successors(node: Node) -> None:
    old = node.allocate("cpu0-0")
    node.attach("web", old)
    node.agent.detach("web")
    node.attach("next", node.allocate("cpu0-0"))
    assert node.granted("next") == [f"cpu 1/{SHARES}"]
    node.attach("web", old)
    assert node.granted("web") == []


@pytest.mark.parametrize(
    "request_values",
    [
        {"id": "x"},
        {"id": "0" * 32, "kind": "tpu", "shares": ["a"], "shares_per_device": 1},
        {"id": "0" * 32, "kind": "cpu", "shares": [], "shares_per_device": 1},
    ],
)
def test_the_control_socket_refuses_what_is_no_grant(node: Node, request_values: dict[str, object]) -> None:
    with pytest.raises(RemoraError) as refused:
        node.agent.ask("Grant", control_v1.GrantRequest(**request_values), control_v1.Empty)
    assert refused.value.code == 3
