"""What a pod in a microVM is to a cluster: reached by logs, exec, address, service and name, and known to the agent.

Real: etcd, API server, controllers, scheduler, kubelets, kube-proxy, CoreDNS, containerd, CNI, the shim, QEMU, the
agent and its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from cluster_objects import block_volume, classification, deployment, service
from containerd_process import BUSYBOX
from kubernetes_cluster import Cluster
from loop_devices import loop_device, unavailable
from pod_agent import Agent, classify, photos

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def classifier(cluster: Cluster, agents: dict[str, Agent]) -> Iterator[Cluster]:
    before = set(cluster.leftovers())
    cluster.apply(classification(2), service())
    cluster.wait("two ready pods", lambda: len(cluster.ready_pods("app=classify")) == 2)
    yield cluster
    cluster.kubectl("delete", "deployment,service", "classify", "--wait=false")
    cluster.wait("nothing of the pods is left", lambda: not set(cluster.leftovers()) - before)


def test_logs_and_exec_reach_into_the_microvm(classifier: Cluster) -> None:
    pod = classifier.ready_pods("app=classify")[0]["metadata"]["name"]
    classifier.wait("the log", lambda: "ready" in classifier.kubectl("logs", pod))
    found = classifier.kubectl("exec", pod, "--", "sh", "-c", "echo $REMORA_ADDRESS")
    assert found == "unix:///run/remora/accel.sock\n"


def test_pods_are_on_both_nodes_and_reach_each_other(classifier: Cluster) -> None:
    pods = classifier.ready_pods("app=classify")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    name, other = pods[0]["metadata"]["name"], pods[1]["status"]["podIP"]
    assert "true" in classifier.kubectl("exec", name, "--", "wget", "-q", "-O-", f"http://{other}:8080/healthz")


def test_a_service_answers_by_its_address_from_outside_and_by_its_name_from_a_microvm(classifier: Cluster) -> None:
    photo = photos()[0]
    address = classifier.get("service", "classify")["spec"]["clusterIP"]
    labels = classify(address, photo.read_bytes(), port=80)
    assert labels[0][0] == int(photo.stem.split("_")[1])
    pod = classifier.ready_pods("app=classify")[0]["metadata"]["name"]
    for name in ("classify", "classify.default", "classify.default.svc.cluster.local"):
        assert "true" in classifier.kubectl("exec", pod, "--", "wget", "-q", "-O-", f"http://{name}/healthz")
    assert address in classifier.kubectl("exec", pod, "--", "nslookup", "classify.default.svc.cluster.local")


def test_a_namespaces_policy_applies_to_its_pods_and_to_no_other(classifier: Cluster, agents: dict[str, Agent]) -> None:
    classifier.kubectl("create", "namespace", "restricted")
    try:
        classifier.apply(classification(1, "restricted"))
        classifier.wait("a ready pod", lambda: classifier.ready_pods("app=classify", "restricted"))
        pod = classifier.ready_pods("app=classify", "restricted")[0]
        picture = photos()[0].read_bytes()
        with pytest.raises(HTTPError) as refusal:
            urlopen(Request(f"http://{pod['status']['podIP']}:8080/classify", data=picture), timeout=60)
        assert refusal.value.code == 403
        rule = '[[label]] 1 operations = ["infer"]'
        assert rule in json.loads(refusal.value.read())["error"]
        metrics = agents[pod["spec"]["nodeName"]].metrics()
        refused = [name for name in metrics if "refusals_total" in name and "restricted" in name]
        assert any("[[label]] 1" in name for name in refused), refused
        for other in classifier.ready_pods("app=classify"):
            assert classify(other["status"]["podIP"], picture)
    finally:
        classifier.kubectl("delete", "namespace", "restricted")


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
def test_a_block_volume_is_a_device_of_the_pod_and_free_once_the_pod_is_gone(cluster: Cluster, tmp_path: Path) -> None:
    pod = {"volumes": [{"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}}]}
    devices = [{"name": "raw", "devicePath": "/dev/raw-disk"}]
    command = ["sleep", "1000000"]
    writer = deployment("writer", 1, pod=pod, image=BUSYBOX, command=command, volumeDevices=devices)
    with loop_device(tmp_path / "disk") as disk:
        cluster.apply(*block_volume("raw", disk.path, cluster.nodes[1].name, "16Mi"), writer)
        try:
            cluster.wait("the writer", lambda: cluster.ready_pods("app=writer"))
            name = cluster.ready_pods("app=writer")[0]["metadata"]["name"]
            script = "echo by a pod | dd of=/dev/raw-disk conv=notrunc,fsync 2>/dev/null; head -c 8 /dev/raw-disk"
            assert cluster.kubectl("exec", name, "--", "sh", "-c", script) == "by a pod"
            assert disk.read(9) == b"by a pod\n"
        finally:
            cluster.kubectl("delete", "deployment", "writer")
            cluster.wait("the pod is gone", lambda: not cluster.get("pods", "-lapp=writer")["items"])
            cluster.kubectl("delete", "pvc,pv", "raw", "--wait=false")
        # The kubelet has one of its own over it, which goes a little later.
        disk.detach()
        cluster.wait("the device is let go of", lambda: not disk.attached)
