"""Shares of accelerators in a real cluster: a node has them, pods get them, and the agent knows whose they are."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster_objects import RUNTIME_CLASS
from kubernetes_cluster import Cluster
from kubernetes_node import Node
from pod_agent import Agent
from remora.agent import status
from remora.wire import control_v1

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]
RESOURCE = "remora.dev/cpu"


@dataclass
class Shares:
    """One node whose kubelet gives shares away."""

    cluster: Cluster
    node: Node
    agent: Agent
    log: Path

    def registrations(self) -> int:
        """Return how often the plugin has said that a kubelet knows it."""
        return self.log.read_text().count("is registered with the kubelet")

    def allocatable(self) -> str:
        return str(self.cluster.get("node", self.node.name)["status"]["allocatable"].get(RESOURCE, "none"))

    def granted(self, pod: str) -> list[str]:
        control = self.node.containerd.runtime / "control.sock"
        answer = status.call(control, "Attachments", control_v1.Empty(), control_v1.AttachmentsResponse)
        named = [each for each in answer.attachments if each.labels.get("pod") == pod]
        return [f"{one.kind} {one.shares}/{one.shares_per_device}" for each in named for one in each.grants]

    def runs(self, pod: str) -> bool:
        return bool(self.cluster.get("pod", pod)["status"].get("phase") == "Running")

    def pod(
        self, name: str, shares: int, *, init_shares: int = 0, annotations: dict[str, str] | None = None
    ) -> dict[str, Any]:
        def container(title: str, count: int, *command: str) -> dict[str, Any]:
            return {
                "name": title,
                "image": "localhost/remora/busybox:1",
                "imagePullPolicy": "Never",
                "command": list(command),
                "resources": {"limits": {RESOURCE: str(count)} if count else {}},
            }

        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "annotations": annotations or {}},
            "spec": {
                "runtimeClassName": "remora",
                "nodeSelector": {"kubernetes.io/hostname": self.node.name},
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 0,
                "initContainers": [container("init", init_shares, "true")] if init_shares else [],
                "containers": [container("main", shares, "sh", "-c", "echo grant $REMORA_GRANT_CPU; sleep 3600")],
            },
        }


@pytest.fixture(scope="module")
def shares(binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shares]:
    """A cluster of one node with an agent and the device plugin."""
    directory = tmp_path_factory.mktemp("grants")
    log = directory / "plugin.log"
    with Cluster(binaries, nodes=1) as cluster:
        cluster.apply(RUNTIME_CLASS)
        (node,) = cluster.nodes
        agent = Agent(node.containerd, directory / "state")
        agent.start()
        command = node.spaces.within([sys.executable, "-m", "remora", "node", "plugin", "--cpus", "1"])
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr)
        try:
            yield Shares(cluster, node, agent, log)
        finally:
            process.send_signal(signal.SIGTERM)
            ended = process.wait(20)
            agent.stop()
            print(log.read_text())
    assert ended == 0


def test_a_pod_gets_what_it_asks_for_and_forges_nothing(shares: Shares) -> None:
    cluster = shares.cluster
    cluster.wait("the node has shares", lambda: shares.allocatable() == "10")
    forged = {"grant.remora.dev/cpu": "0" * 32, "io.remora.label.uid": "another"}
    cluster.apply(shares.pod("three", 3, init_shares=2), shares.pod("none", 0, annotations=forged))
    for name in ("three", "none"):
        cluster.wait(f"pod {name} runs", lambda name=name: shares.runs(name))  # type: ignore[misc]
    assert (shares.granted("three"), shares.granted("none")) == (["cpu 3/10"], [])
    assert cluster.kubectl("logs", "three").strip() == "grant 3/10"
    cluster.apply(shares.pod("much", 8))
    assert not shares.runs("much")  # seven are left
    cluster.kubectl("delete", "pod", "three", "--wait")
    cluster.wait("its shares go to the next", lambda: shares.runs("much"))
    assert shares.granted("much") == ["cpu 8/10"]
    cluster.kubectl("delete", "pod", "none", "much", "--wait")


def test_a_node_has_shares_while_its_agent_serves_and_after_its_kubelet_restarts(shares: Shares) -> None:
    cluster = shares.cluster
    cluster.wait("the node has shares", lambda: shares.allocatable() == "10")
    shares.agent.stop()
    cluster.wait("none without the agent", lambda: shares.allocatable() == "0")
    shares.agent.start()
    cluster.wait("all are back", lambda: shares.allocatable() == "10")
    registered = shares.registrations()
    shares.node.restart("kubelet")
    cluster.wait("the next kubelet is registered with", lambda: shares.registrations() > registered)
    cluster.wait("it has them again", lambda: shares.allocatable() == "10")
