"""Kubernetes runs the classification service in microVMs: it is scaled, disturbed and deleted, and nothing goes wrong.

Real: etcd, API server, controllers, scheduler, kubelet, containerd, CNI, the shim, QEMU, the agent and its model.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kubernetes_cluster import NODE, READY_S, Cluster
from pod_agent import IMAGE, Agent, add_service_image, classify, photos
from remora.sandboxes.leftovers import find_leftovers

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "remora"},
    "handler": "remora",
    "overhead": {"podFixed": {"memory": "120Mi", "cpu": "10m"}},
}


def deployment(name: str, replicas: int, **container: Any) -> dict[str, Any]:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "runtimeClassName": "remora",
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 2,
                    "containers": [{"name": "main", "imagePullPolicy": "Never", **container}],
                },
            },
        },
    }


def classification(replicas: int) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 2, "timeoutSeconds": 5}
    return deployment(
        "classify",
        replicas,
        image=IMAGE,
        ports=[{"containerPort": 8080}],
        readinessProbe=probe,
        resources={"limits": {"memory": "256Mi", "cpu": "1"}, "requests": {"memory": "64Mi", "cpu": "50m"}},
    )


@pytest.fixture(scope="module")
def agent(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    scratch = tmp_path_factory.mktemp("agent")
    add_service_image(cluster.containerd, scratch)
    cluster.apply(RUNTIME_CLASS)
    one = Agent(cluster.containerd, scratch / "state")
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def service(cluster: Cluster, agent: Agent) -> Iterator[Cluster]:
    cluster.apply(classification(1))
    cluster.wait("one ready pod", lambda: len(cluster.ready_pods("app=classify")) == 1)
    yield cluster
    cluster.kubectl("delete", "deployment", "classify", "--wait=false")
    cluster.wait("no pods", lambda: not cluster.get("pods")["items"])


def scale(cluster: Cluster, replicas: int) -> list[dict[str, Any]]:
    cluster.kubectl("scale", "deployment", "classify", f"--replicas={replicas}")

    def settled() -> bool:
        pods = cluster.get("pods", "-l", "app=classify")["items"]
        return len(pods) == replicas == len(cluster.ready_pods("app=classify"))

    cluster.wait(f"{replicas} ready pods and no others", settled, READY_S * 2)
    return cluster.ready_pods("app=classify")


def addresses(pods: list[dict[str, Any]]) -> list[str]:
    return [pod["status"]["podIP"] for pod in pods]


def right(address: str) -> None:
    photo = photos()[0]
    assert classify(address, photo.read_bytes())[0][0] == int(photo.stem.split("_")[1])


class Load:
    """Asks whatever pods are ready, over and over; every answer must be right."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._photo = photos()[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = 0
        self.wrong: list[object] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        picture, label = self._photo.read_bytes(), int(self._photo.stem.split("_")[1])
        while not self._stop.is_set():
            try:
                pods = self._cluster.ready_pods("app=classify")
            except RuntimeError:
                time.sleep(0.5)
                continue
            for address in addresses(pods):
                if self._stop.is_set():
                    return
                try:
                    found = classify(address, picture, timeout_s=0)[0][0]
                except AssertionError:
                    continue  # that pod ended meanwhile; who asks takes another
                self.answers += 1
                if found != label:
                    self.wrong.append(found)


def test_the_service_is_scaled_up_to_zero_and_up_again(service: Cluster) -> None:
    for replicas in (3, 0, 2):
        pods = scale(service, replicas)
        for address in addresses(pods):
            right(address)
        # Each pod is a microVM of its own.
        uids = {pod["metadata"]["uid"] for pod in pods}
        assert len(uids) == len(pods) == replicas


def test_logs_exec_and_port_forward_reach_into_the_microvm(service: Cluster) -> None:
    pod = scale(service, 1)[0]["metadata"]["name"]
    service.wait("the log", lambda: "ready" in service.kubectl("logs", pod))
    assert service.kubectl("exec", pod, "--", "sh", "-c", "echo $REMORA_ADDRESS") == "unix:///run/remora/accel.sock\n"


def test_a_service_and_its_endpoints_follow_the_pods(service: Cluster) -> None:
    service.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "classify", "namespace": "default"},
            "spec": {"selector": {"app": "classify"}, "ports": [{"port": 80, "targetPort": 8080}]},
        }
    )
    pods = scale(service, 2)

    def endpoints() -> bool:
        slices = service.get("endpointslices", "-l", "kubernetes.io/service-name=classify")["items"]
        ready = [a for s in slices for e in s["endpoints"] or () if e["conditions"]["ready"] for a in e["addresses"]]
        return sorted(ready) == sorted(addresses(pods))

    service.wait("endpoints", endpoints)


def test_no_answer_is_wrong_while_agent_and_kubelet_are_restarted(service: Cluster, agent: Agent) -> None:
    scale(service, 2)
    with Load(service) as load:
        service.wait("first answers", lambda: load.answers > 2)
        agent.stop(signal.SIGKILL)
        agent.start()
        seen = load.answers
        service.wait("answers after the agent's restart", lambda: load.answers > seen + 2)
        service.restart("kubelet")
        service.wait("the node", lambda: service.kubectl("get", "node", NODE).count(" Ready ") == 1)
        seen = load.answers
        service.wait("answers after the kubelet's restart", lambda: load.answers > seen + 2)
    assert load.wrong == []


def test_after_a_drain_the_service_comes_back_elsewhere_or_on_the_uncordoned_node(service: Cluster) -> None:
    before = {pod["metadata"]["uid"] for pod in scale(service, 1)}
    service.kubectl("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
    service.kubectl("uncordon", NODE)
    service.wait("a new ready pod", lambda: service.ready_pods("app=classify"))
    pods = service.ready_pods("app=classify")
    assert not before & {pod["metadata"]["uid"] for pod in pods}
    right(addresses(pods)[0])


def test_everything_deleted_leaves_nothing(cluster: Cluster, agent: Agent) -> None:
    cluster.apply(deployment("idle", 2, image=IMAGE, command=["sleep", "100000"]))
    cluster.wait("two pods", lambda: len(cluster.ready_pods("app=idle")) == 2)
    cluster.kubectl("delete", "deployment", "idle")
    cluster.wait("no pods", lambda: not cluster.get("pods", "-l", "app=idle")["items"])
    sandboxes = cluster.containerd.runtime / "sandboxes"

    def microvms() -> list[str]:
        return [line for line in find_leftovers(sandboxes) if "qemu" in line]

    cluster.wait("no microVM", lambda: not microvms(), 60)
