"""The classification service under constant load is scaled, disturbed and deleted: no answer is wrong, none is lost.

How requests are counted: `constant_load`. `pytest -s` shows the figures of each step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster_objects import classification, service
from constant_load import ConstantLoad, right_ones
from kubernetes_cluster import Cluster
from pod_agent import Agent, labelled_pictures

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
APP = "app=classify"


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, agents: dict[str, Agent]) -> set[str]:
    """What the nodes had before this module."""
    return set(cluster.leftovers())


@pytest.fixture(scope="module")
def load(cluster: Cluster, untouched: set[str]) -> Iterator[ConstantLoad]:
    """Clients at work over all tests of this module."""
    cluster.apply(classification(1), service())
    cluster.wait("one ready pod", lambda: len(cluster.ready_pods(APP)) == 1)
    address = cluster.get("service", "classify")["spec"]["clusterIP"]
    known = right_ones(ConstantLoad((address, 80), []), labelled_pictures(), timeout_s=60)
    assert len(known) >= 4
    with ConstantLoad((address, 80), known) as one:
        yield one


def report(load: ConstantLoad, what: str, began_s: float) -> None:
    """Say how a step went, and hold it to what is promised."""
    tally = load.lap()
    print(f"\n{what}: {time.monotonic() - began_s:.1f} s; {tally}")
    assert tally.wrong == []
    assert tally.lost == []


def scale(cluster: Cluster, replicas: int) -> list[dict[str, Any]]:
    cluster.kubectl("scale", "deployment", "classify", f"--replicas={replicas}")
    return cluster.pods_are(APP, replicas)


def counted(cluster: Cluster, agents: dict[str, Agent], pods: list[dict[str, Any]]) -> bool:
    """Tell whether the agent of each pod's node has answered it, under its own namespace and name."""
    for pod in pods:
        name = pod["metadata"]["name"]
        metrics = agents[pod["spec"]["nodeName"]].metrics()
        if not metrics.get(f'remora_pod_operations_total{{namespace="default",pod="{name}"}}'):
            return False
    return True


def answers_go_on(cluster: Cluster, load: ConstantLoad) -> None:
    seen = load.right
    cluster.wait("answers", lambda: load.right > seen + 10)


@pytest.mark.parametrize("replicas", [6, 0, 3])
def test_scaled_by_hand_each_pod_is_a_microvm_that_the_agent_knows_by_name(
    cluster: Cluster, agents: dict[str, Agent], load: ConstantLoad, replicas: int
) -> None:
    began_s = time.monotonic()
    pods = scale(cluster, replicas)
    settled_s = time.monotonic() - began_s
    assert sum(len(node.microvms()) for node in cluster.nodes) == replicas
    cluster.wait("each pod has answered", lambda: counted(cluster, agents, pods))
    report(load, f"kubectl scale to {replicas} (settled after {settled_s:.1f} s)", began_s)


def test_an_agent_that_is_killed_and_started_again_costs_no_answer(
    cluster: Cluster, agents: dict[str, Agent], load: ConstantLoad
) -> None:
    scale(cluster, 3)
    began_s = time.monotonic()
    for agent in agents.values():
        agent.stop(signal.SIGKILL)
        agent.start()
        answers_go_on(cluster, load)
    pods = cluster.pods_are(APP, 3)
    cluster.wait("each pod has answered again", lambda: counted(cluster, agents, pods))
    report(load, "SIGKILL of both agents in turn", began_s)


def test_a_kubelet_that_is_killed_and_started_again_costs_no_answer(cluster: Cluster, load: ConstantLoad) -> None:
    before = {pod["metadata"]["uid"] for pod in scale(cluster, 3)}
    began_s = time.monotonic()
    for node in cluster.nodes:
        node.restart("kubelet")
        cluster.wait("all nodes are ready", cluster.all_nodes_ready)
        answers_go_on(cluster, load)
    # It found its pods again and started none anew.
    assert {pod["metadata"]["uid"] for pod in cluster.pods_are(APP, 3)} == before
    report(load, "SIGKILL of both kubelets in turn", began_s)


def test_a_drained_nodes_pods_come_back_elsewhere(cluster: Cluster, load: ConstantLoad) -> None:
    with_dns = cluster.ready_pods("k8s-app=kube-dns", "kube-system")[0]["spec"]["nodeName"]
    node = next(node for node in cluster.nodes if node.name != with_dns)
    scale(cluster, 3)
    began_s = time.monotonic()
    cluster.kubectl("drain", node.name, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
    assert {pod["spec"]["nodeName"] for pod in cluster.pods_are(APP, 3)} == {with_dns}
    assert node.microvms() == []
    report(load, "kubectl drain", began_s)
    began_s = time.monotonic()
    cluster.kubectl("uncordon", node.name)
    cluster.kubectl("rollout", "restart", "deployment", "classify")
    cluster.kubectl("rollout", "status", "deployment", "classify", "--timeout=170s")
    assert len({pod["spec"]["nodeName"] for pod in cluster.pods_are(APP, 3)}) == 2
    report(load, "uncordon and a rollout", began_s)


def test_everything_deleted_leaves_nothing(cluster: Cluster, untouched: set[str], load: ConstantLoad) -> None:
    began_s = time.monotonic()
    cluster.kubectl("delete", "deployment,service", "classify", "--wait=false")
    cluster.wait("no pods", lambda: not cluster.get("pods", "-l", APP)["items"])
    try:
        cluster.wait("nothing is left", lambda: not set(cluster.leftovers()) - untouched, 60)
    finally:
        print("\n".join(sorted(set(cluster.leftovers()) - untouched)))
    report(load, "everything deleted", began_s)
    print(f"in all: {load.total}")
