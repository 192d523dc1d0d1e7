"""The chart on a node that knows nothing of Remora: installed, used, scaled by its figures, and gone without a trace.

The agent, the device plugin, the node's installer and the autoscaling server run in containers of runc from the image
that `make image` builds; the shim and its microVMs run on the node, from what the installer put there.

Not shown here: NetworkPolicies (CNI's bridge plugin enforces none), ServiceMonitors (no Prometheus operator), GPUs.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_objects import add_dns_image, classification, dns, service
from constant_load import ConstantLoad
from kubernetes_cluster import Cluster
from pod_agent import add_service_image, known_answers

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "build" / "remora-agent.tar"
NAMESPACE = "remora"
#: The nodes here have no systemd, so containerd is started anew by the test, where the chart would do it.
VALUES = ("installer.restart=false", "autoscaling.enabled=true", "autoscaling.window=15", "agent.drainSeconds=5")
#: Any load at all is enough for six pods of 0.03 requests per second each, also on a machine that is busy otherwise,
#: and no load is enough for a second pod of a thousand.
BUSY, QUIET = "30m", "1000"


def autoscaler(per_pod: str) -> dict[str, Any]:
    """A HorizontalPodAutoscaler of 1 to 6 pods by requests per second of each."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "classify", "namespace": "default"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "classify"},
            "minReplicas": 1,
            "maxReplicas": 6,
            # Pods that start take processors from those that answer: no reason to end them again.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 30}},
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": "remora_requests_per_second"},
                        "target": {"type": "AverageValue", "averageValue": per_pod},
                    },
                }
            ],
        },
    }


@pytest.fixture(scope="module")
def bare(binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node with runc alone."""
    if not IMAGE.is_file():
        pytest.skip(f"{IMAGE} is missing: run make image")
    with Cluster(binaries, nodes=1, remora=False) as one:
        containerd = one.nodes[0].containerd
        done = containerd.ctr("images", "import", str(IMAGE), timeout_s=300)
        assert done.returncode == 0, done.stderr.decode()
        add_dns_image(containerd, binaries["coredns"])
        add_service_image(containerd, tmp_path_factory.mktemp("image"))
        one.apply(*dns())
        one.wait("DNS", lambda: one.ready_pods("k8s-app=kube-dns", "kube-system"))
        yield one


def helm(cluster: Cluster, *arguments: str) -> str:
    command = [str(cluster.binaries["helm"]), f"--kubeconfig={cluster.kubeconfig}", f"--namespace={NAMESPACE}"]
    environment = {"HOME": str(cluster.directory), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings(*more: str) -> list[str]:
    return [word for value in (*VALUES, *more) for word in ("--set", value)]


def restart_containerd(cluster: Cluster) -> None:
    containerd = cluster.nodes[0].containerd
    containerd.kill(15)
    containerd.start()


def node_is_set_up(cluster: Cluster) -> bool:
    """Tell whether the installer has ended in this state of the chart."""
    pods = cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=agent")["items"]
    conditions = [one for pod in pods for one in pod["status"].get("conditions", ()) if "deletionTimestamp" not in pod]
    return any(one["type"] == "Initialized" and one["status"] == "True" for one in conditions)


@pytest.fixture(scope="module")
def before(bare: Cluster) -> tuple[set[str], set[str], str]:
    """What pods have on the node, its files, and containerd's configuration, before the chart."""
    node = bare.nodes[0]
    config = node.spaces.path("/etc/containerd/config.toml").read_text()
    return set(bare.leftovers()), node.spaces.written(), config


@pytest.fixture(scope="module")
def installed(bare: Cluster, before: tuple[set[str], set[str], str]) -> Cluster:
    began_s = time.monotonic()
    chart = ROOT / "charts" / "remora"
    print(helm(bare, "install", "remora", str(chart), "--create-namespace", *settings()))
    bare.wait("the node is set up", lambda: node_is_set_up(bare))
    restart_containerd(bare)

    def ready() -> bool:
        parts = bare.get("daemonsets,deployments", "-n", NAMESPACE)["items"]
        status = [one["status"] for one in parts]
        return len(parts) == 2 and all(one.get("numberReady", one.get("readyReplicas")) == 1 for one in status)

    try:
        bare.wait("everything of the chart is ready", ready)
    except AssertionError:
        print(bare.kubectl("describe", "pods", "-n", NAMESPACE))
        raise
    print(f"\nhelm install to ready: {time.monotonic() - began_s:.1f} s")
    return bare


def test_the_node_offers_its_shares_and_the_cluster_the_runtime(installed: Cluster) -> None:
    name = installed.nodes[0].name

    def shares() -> int:
        return int(installed.get("node", name)["status"]["allocatable"].get("remora.dev/cpu", 0))

    assert installed.wait("shares", shares) % 10 == 0
    runtime = installed.get("runtimeclass", "remora")
    assert runtime["handler"] == "remora"
    assert runtime["overhead"]["podFixed"]


def test_helms_own_test_reaches_the_agent_from_a_microvm(installed: Cluster) -> None:
    began_s = time.monotonic()
    try:
        assert "Phase:          Succeeded" in helm(installed, "test", "remora", "--timeout=200s")
    except AssertionError:
        print(installed.kubectl("describe", "pod", "remora-ping", "-n", NAMESPACE))
        print(installed.kubectl("logs", "remora-ping", "-n", NAMESPACE))
        raise
    print(f"\nhelm test: {time.monotonic() - began_s:.1f} s")


def test_a_pod_with_shares_answers_by_the_agent_of_the_chart(installed: Cluster) -> None:
    installed.apply(classification(1, shares=1), service())
    installed.wait("one ready pod", lambda: installed.ready_pods("app=classify"))
    assert len(installed.nodes[0].microvms()) == 1
    address = installed.get("service", "classify")["spec"]["clusterIP"]
    assert len(known_answers(address)) >= 4


def test_the_autoscaler_follows_the_load_up_and_down_and_no_answer_is_wrong_or_lost(installed: Cluster) -> None:
    address = installed.get("service", "classify")["spec"]["clusterIP"]

    def replicas() -> int:
        return len(installed.ready_pods("app=classify"))

    installed.apply(autoscaler(BUSY))
    began_s = time.monotonic()
    with ConstantLoad((address, 80), known_answers(address), clients=3) as load:
        installed.wait("six pods under load", lambda: replicas() == 6, 420)
        print(f"\nautoscaler 1 -> 6: {time.monotonic() - began_s:.1f} s; {load.lap()}")
        assert len(installed.nodes[0].microvms()) == 6
        began_s = time.monotonic()
        installed.apply(autoscaler(QUIET))
        installed.wait("one pod under load", lambda: replicas() == 1, 240)
        print(f"autoscaler 6 -> 1: {time.monotonic() - began_s:.1f} s; {load.lap()}")
        installed.wait("one microVM", lambda: len(installed.nodes[0].microvms()) == 1)
    assert load.total.wrong == []
    assert load.total.lost == []
    assert load.total.right


def test_an_upgrade_of_the_agents_costs_no_answer(installed: Cluster) -> None:
    address = installed.get("service", "classify")["spec"]["clusterIP"]
    installed.kubectl("delete", "hpa", "classify", "--ignore-not-found")
    installed.kubectl("scale", "deployment", "classify", "--replicas=1")
    installed.wait("one ready pod", lambda: len(installed.ready_pods("app=classify")) == 1)

    def agents() -> set[str]:
        selector = "app.kubernetes.io/component=agent"
        return {pod["metadata"]["uid"] for pod in installed.ready_pods(selector, NAMESPACE)}

    before = agents()
    chart = ROOT / "charts" / "remora"
    with ConstantLoad((address, 80), known_answers(address), clients=2) as load:
        began_s = time.monotonic()
        helm(installed, "upgrade", "remora", str(chart), *settings("agent.logFormat=text"))
        installed.wait("another agent", lambda: len(agents()) == 1 and not agents() & before, 120)
        took_s = time.monotonic() - began_s
        right = load.right
        installed.wait("answers go on", lambda: load.right >= right + 5)
    print(
        f"\nhelm upgrade to the next agent: {took_s:.1f} s; {load.total}; slowest {max(load.total.latencies_ms):.0f} ms"
    )
    assert load.total.wrong == []
    assert load.total.lost == []


def test_uninstalled_the_node_is_as_it_was(installed: Cluster, before: tuple[set[str], set[str], str]) -> None:
    installed.kubectl("delete", "hpa,deployment,service", "classify", "--ignore-not-found")
    installed.wait("no pods", lambda: not installed.get("pods", "-l", "app=classify")["items"])
    pods, files, config = before
    node = installed.nodes[0]
    chart = ROOT / "charts" / "remora"
    installed.wait("no microVM", lambda: not node.microvms())
    helm(installed, "upgrade", "remora", str(chart), *settings("installer.action=uninstall"))

    def ours() -> list[str]:
        # What the agent keeps, sessions and models, outlives an installation.
        return sorted(file for file in node.spaces.written() - files if not file.startswith("/var/lib/remora"))

    installed.wait("the node has none of our files", lambda: not ours())
    assert node.spaces.path("/etc/containerd/config.toml").read_text() == config
    restart_containerd(installed)
    helm(installed, "uninstall", "remora", "--wait")
    installed.kubectl("delete", "namespace", NAMESPACE)
    kinds = "all,clusterroles,clusterrolebindings,runtimeclasses,configmaps,secrets,networkpolicies,apiservices"
    named: dict[str, Any] = json.loads(installed.kubectl("get", kinds, "-A", "-o", "json"))
    left = [one["metadata"]["name"] for one in named["items"] if "remora" in one["metadata"]["name"]]
    assert left == [node.name] or left == []
    installed.wait("nothing of pods is left", lambda: not set(installed.leftovers()) - pods, 60)
    assert ours() == []
