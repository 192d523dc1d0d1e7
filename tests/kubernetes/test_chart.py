"""The chart on nodes that know nothing of Remora: installed, used, scaled by hand and by its figures, and gone.

In a cluster of the tests' own, or in the one that KUBECONFIG names: there kubectl and helm alone are asked, and what
looks into a node is skipped. The agent, the device plugin, the node's installer and the autoscaling server run in
ordinary containers from the image that `make image` builds; the shim and its microVMs run on the node, from what the
installer put there.

Not shown here: NetworkPolicies (CNI's bridge plugin enforces none), ServiceMonitors (no Prometheus operator), GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import kubernetes_binaries
from chart_release import Release, has_custom_metrics, refusal, values_of_environment
from cluster_objects import autoscaler, classification, service
from kubernetes_client import KubernetesClient
from kubernetes_cluster import Cluster
from kubernetes_node import Node
from pod_agent import IMAGE as SERVICE_IMAGE
from pod_agent import labelled_pictures
from pod_load import PodLoad, load_pod

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
IMAGE = Path(__file__).parents[2] / "build" / "remora-agent.tar"
APP = "app=classify"
VALUES = ("autoscaling.window=15", "agent.drainSeconds=5")
#: Any load at all is enough for six pods of 0.03 requests per second each, also on a machine that is busy otherwise,
#: and no load is enough for a second pod of a thousand.
BUSY, QUIET = "30m", "1000"
#: Pods that start take processors from those that answer: no reason to end them again.
BEHAVIOR = {"scaleDown": {"stabilizationWindowSeconds": 30}}


@dataclass
class Place:
    """Where the chart is tried."""

    release: Release
    #: Of the service, in a cluster that has it.
    image: str = SERVICE_IMAGE
    autoscaling: bool = True
    #: The one node of a cluster of the tests' own.
    own: Node | None = None

    def restart_containerd(self) -> None:
        """What an installer without systemd leaves to the operator."""
        if self.own is not None:
            self.own.containerd.kill(15)
            self.own.containerd.start()


@pytest.fixture(scope="module")
def place(asked_for: None, request: pytest.FixtureRequest) -> Iterator[Place]:
    if not os.environ.get("KUBECONFIG"):
        yield request.getfixturevalue("bare")
        return
    given = given_place(os.environ["KUBECONFIG"])
    try:
        yield given
    finally:
        given.release.clear()


def given_place(kubeconfig: str) -> Place:
    """Return the cluster that somebody gave, in which nothing but our own may be touched."""
    kubectl, helm = (kubernetes_binaries.find(name) for name in ("kubectl", "helm"))
    cluster = KubernetesClient(kubectl, kubeconfig)
    if why := refusal(cluster):
        pytest.skip(why)
    values, files = values_of_environment()
    autoscaling = not has_custom_metrics(cluster)
    release = Release(
        helm, kubectl, kubeconfig, (*VALUES, f"autoscaling.enabled={autoscaling}".lower(), *values), files
    )
    image = os.environ.get("REMORA_TEST_SERVICE_IMAGE", SERVICE_IMAGE)
    return Place(release, image=image, autoscaling=autoscaling)


@pytest.fixture(scope="module")
def bare(binaries: dict[str, Path]) -> Iterator[Place]:
    """A cluster of one node with runc alone."""
    if not IMAGE.is_file():
        pytest.skip(f"{IMAGE} is missing: run make image")
    with Cluster(binaries, nodes=1, remora=False) as one:
        one.nodes[0].containerd.import_archive(IMAGE)
        one.add_images()
        # The nodes here have no systemd.
        values = (*VALUES, "autoscaling.enabled=true", "installer.restart=false")
        release = Release(binaries["helm"], binaries["kubectl"], one.kubeconfig, values)
        yield Place(release, own=one.nodes[0])


@dataclass
class Before:
    """A node before the chart: what pods have on it, its files, containerd's configuration."""

    pods: set[str]
    files: set[str]
    config: str


@pytest.fixture(scope="module")
def before(place: Place) -> Before | None:
    if place.own is None:
        return None
    config = place.own.spaces.path("/etc/containerd/config.toml").read_text()
    return Before(set(place.own.leftovers()), place.own.spaces.written(), config)


@pytest.fixture(scope="module")
def installed(place: Place, before: Before | None) -> Place:
    began_s = time.monotonic()
    release = place.release
    print(release.install())
    release.wait("the nodes are set up", release.nodes_are_set_up)
    place.restart_containerd()
    try:
        release.wait("everything of the chart is ready", release.is_ready)
    except AssertionError:
        print(release.kubectl("describe", "pods"))
        raise
    print(f"\nhelm install to ready: {time.monotonic() - began_s:.1f} s")
    return place


@pytest.fixture(scope="module")
def load(installed: Place) -> Iterator[PodLoad]:
    """Clients in the cluster, at work from the first pod of the service to its end."""
    release = installed.release
    release.apply(
        classification(1, release.name, shares=1, image=installed.image),
        service(namespace=release.name),
        load_pod("load", release.name, installed.image),
    )
    release.pods_are(APP, 1)
    release.wait("the pod of the load", lambda: release.get("pod", "load")["status"].get("phase") == "Running")
    with PodLoad(release, "load", ("classify", 80), labelled_pictures(), clients=3) as one:
        yield one


def report(load: PodLoad, what: str, began_s: float) -> None:
    """Say how a step went, and hold it to what is promised."""
    tally = load.lap()
    print(f"\n{what}: {time.monotonic() - began_s:.1f} s; {tally}")
    assert tally.wrong == []
    assert tally.lost == []


def test_the_nodes_offer_their_shares_and_the_cluster_the_runtime(installed: Place) -> None:
    release = installed.release
    agents = release.get("pods", "-l", "app.kubernetes.io/component=agent")["items"]
    for name in {pod["spec"]["nodeName"] for pod in agents}:

        def shares(name: str = name) -> int:
            return int(release.get("node", name)["status"]["allocatable"].get("remora.dev/cpu", 0))

        assert release.wait(f"shares of {name}", shares) % 10 == 0
    runtime = release.get("runtimeclass", "remora")
    assert runtime["handler"] == "remora"
    assert runtime["overhead"]["podFixed"]


def test_helms_own_test_reaches_the_agent_from_a_microvm(installed: Place) -> None:
    release = installed.release
    began_s = time.monotonic()
    try:
        assert "Phase:          Succeeded" in release.helm("test", release.name, "--timeout=200s")
    except AssertionError:
        print(release.kubectl("describe", "pod", f"{release.name}-ping"))
        print(release.kubectl("logs", f"{release.name}-ping"))
        raise
    print(f"\nhelm test: {time.monotonic() - began_s:.1f} s")


def test_a_pod_with_shares_answers_by_the_agent_of_the_chart(installed: Place, load: PodLoad) -> None:
    assert load.known >= 4
    pod = installed.release.ready_pods(APP)[0]["metadata"]["name"]
    granted = installed.release.kubectl("exec", pod, "--", "sh", "-c", "echo $REMORA_GRANT_CPU")
    assert granted == "1/10\n"


@pytest.mark.parametrize("replicas", [3, 0, 1])
def test_scaled_by_hand_each_pod_is_a_microvm_of_its_own(installed: Place, load: PodLoad, replicas: int) -> None:
    release = installed.release
    began_s = time.monotonic()
    release.kubectl("scale", "deployment", "classify", f"--replicas={replicas}")
    names = [pod["metadata"]["name"] for pod in release.pods_are(APP, replicas)]
    kernels = {release.kubectl("exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id") for name in names}
    assert len(kernels) == replicas
    if installed.own is not None:
        assert len(installed.own.microvms()) == replicas
    report(load, f"kubectl scale to {replicas}", began_s)


def test_the_autoscaler_follows_the_load_up_and_down_and_no_answer_is_wrong_or_lost(
    installed: Place, load: PodLoad
) -> None:
    if not installed.autoscaling:
        pytest.skip("the cluster has a server of custom.metrics.k8s.io already, and there can be one")
    release = installed.release
    for per_pod, count in ((BUSY, 6), (QUIET, 1)):
        began_s = time.monotonic()
        metric = "remora_requests_per_second"
        release.apply(autoscaler(metric, per_pod, 6, release.name, behavior=BEHAVIOR))
        release.pods_are(APP, count, 420)
        report(load, f"autoscaler to {count}", began_s)
    release.kubectl("delete", "hpa", "classify")
    assert load.total.right


def test_an_upgrade_of_the_agents_costs_no_answer(installed: Place, load: PodLoad) -> None:
    release = installed.release

    def agents() -> set[str]:
        return {pod["metadata"]["uid"] for pod in release.ready_pods("app.kubernetes.io/component=agent")}

    before = agents()
    load.lap()
    began_s = time.monotonic()
    release.upgrade("agent.logFormat=text")
    release.wait("other agents", lambda: len(agents()) == len(before) and not agents() & before, 120)
    report(load, "helm upgrade to the next agents", began_s)
    answered = load.total.right
    release.wait("answers go on", lambda: load.lap() and load.total.right >= answered + 5)


def test_uninstalled_nothing_of_it_is_in_the_cluster(installed: Place, load: PodLoad) -> None:
    release = installed.release
    began_s = time.monotonic()
    release.kubectl("delete", "deployment,service", "classify", "--wait=false")
    release.wait("no pods", lambda: not release.get("pods", "-l", APP)["items"])
    report(load, "everything deleted", began_s)
    print(f"in all: {load.total}")
    if installed.own is not None:
        # The installer refuses where pods of the runtime are.
        release.wait("no microVM", lambda: not installed.own or not installed.own.microvms())
    release.upgrade("installer.action=uninstall")
    release.kubectl("rollout", "status", f"daemonset/{release.name}-agent", "--timeout=170s")
    release.wait("the nodes are as before", release.nodes_are_set_up)
    installed.restart_containerd()
    release.uninstall()
    release.wait("nothing of the release is left", lambda: not release.traces(), 60)


def test_uninstalled_the_node_is_as_it_was(installed: Place, before: Before | None) -> None:
    if installed.own is None or before is None:
        pytest.skip("it looks into the files of a node: without KUBECONFIG the node is one of the tests' own")
    spaces = installed.own.spaces
    # What the agent keeps, sessions and models, outlives an installation.
    assert [name for name in spaces.written() - before.files if not name.startswith("/var/lib/remora")] == []
    assert spaces.path("/etc/containerd/config.toml").read_text() == before.config
    node, pods = installed.own, before.pods
    installed.release.wait("nothing of pods is left", lambda: not set(node.leftovers()) - pods, 60)
