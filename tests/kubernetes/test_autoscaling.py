"""A real HorizontalPodAutoscaler scales a Deployment on what an agent counts: real API server, controllers and agent;
the pods exist in the API alone, and each has a sandbox attached to the agent under its name."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kubernetes_binaries
from agent_process import AgentProcess, Guest, catalogue_directory
from api_only_cluster import ApiOnlyCluster
from cluster_objects import autoscaler
from remora.errors import RemoraError

pytestmark = pytest.mark.timeout(300)
METRIC = "remora_inflight_requests"
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "classify", "namespace": "default"},
    "spec": {
        "replicas": 1,
        "selector": {"matchLabels": {"app": "classify"}},
        "template": {
            "metadata": {"labels": {"app": "classify"}},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [{"name": "main", "image": "none"}]},
        },
    },
}


@pytest.fixture(scope="module")
def plane(none_given: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiOnlyCluster]:
    with ApiOnlyCluster(kubernetes_binaries.build(), tmp_path_factory.mktemp("plane")) as one:
        yield one


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    one = AgentProcess(tmp_path_factory.mktemp("agent"), models=catalogue_directory())
    one.start()
    yield one
    assert one.stop() == 0


@pytest.fixture(scope="module")
def metrics(plane: ApiOnlyCluster, agent: AgentProcess) -> Iterator[ApiOnlyCluster]:
    """The aggregated server, behind an APIService."""
    import base64

    name = "remora-autoscaling"
    certificate, key = plane.front_proxy.issue(name, alternative=f"DNS:{name}.default.svc")
    token = plane.directory / "token"
    token.write_text(plane.token)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = ["--listen", f"tls://127.0.0.1:{port}", "--tls-cert", str(certificate), "--tls-key", str(key)]
    command += ["--agent", f"unix://{agent.metrics}", "--interval", "0.5", "--window", "3"]
    command += ["--api", plane.url, "--api-token", str(token), "--api-ca", str(plane.authority)]
    with (plane.directory / "autoscaling.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "remora", "autoscaling", *command], stderr=log)
    bundle = base64.b64encode(plane.front_proxy.certificate.read_bytes()).decode()
    plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": "v1beta2.custom.metrics.k8s.io"},
            "spec": {
                "group": "custom.metrics.k8s.io",
                "version": "v1beta2",
                "service": {"namespace": "default", "name": name, "port": port},
                "caBundle": bundle,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
            },
        },
    )
    try:
        plane.wait("the API is available", lambda: available(plane))
        yield plane
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(20)
        print((plane.directory / "autoscaling.log").read_text())
    assert status == 0


def available(plane: ApiOnlyCluster) -> bool:
    conditions = plane.get("apiservice", "v1beta2.custom.metrics.k8s.io").get("status", {}).get("conditions", [])
    failed = [one["message"] for one in conditions if one["type"] == "Available" and one["status"] != "True"]
    if failed:
        raise RuntimeError(failed[0])
    return bool(conditions)


def test_discovery_through_the_api_server_names_the_metrics(metrics: ApiOnlyCluster) -> None:
    listed = metrics.wait("discovery", lambda: metrics.kubectl("get", "--raw", "/apis/custom.metrics.k8s.io/v1beta2"))
    assert f"pods/{METRIC}" in listed
    # Found by the aggregated discovery document, too, which clients ask for.
    metrics.wait("the group is known", lambda: "custom.metrics.k8s.io/v1beta2" in metrics.kubectl("api-versions"))


def replicas(plane: ApiOnlyCluster) -> int:
    return int(plane.get("deployment", "classify")["spec"]["replicas"])


class Load:
    """So many requests at once, all the time, spread over the pods that there are."""

    def __init__(self, agent: AgentProcess, count: int) -> None:
        self._agent = agent
        self.paths: list[Path] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            paths = self.paths
            if not paths:
                self._stop.wait(0.05)
                continue
            try:
                with Guest(self._agent.connect(paths[number % len(paths)])) as guest:
                    while not self._stop.is_set() and self.paths is paths:
                        guest.infer("identity")
            except (OSError, RemoraError):
                self._stop.wait(0.05)  # its pod was scaled away

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)


def test_an_autoscaler_follows_the_load_up_and_down(metrics: ApiOnlyCluster, agent: AgentProcess) -> None:
    metrics.apply(DEPLOYMENT, autoscaler(METRIC, "2", 4))
    attached: dict[str, Path] = {}
    load = Load(agent, 8)

    def pods_follow() -> None:
        """Do what a kubelet and a runtime do: run new pods, attach their sandboxes, let go of the others."""
        names = metrics.run_pods("app=classify")
        for name in names:
            if name not in attached:
                labels = {"namespace": "default", "pod": name}
                attached[name] = agent.attach(f"default.{name}", labels=labels)
        for name in set(attached) - set(names):
            agent.detach(f"default.{name}")
            del attached[name]
        paths = [attached[name] for name in names]
        if paths != load.paths:
            load.paths = paths

    def scaled_to(count: int) -> bool:
        pods_follow()
        return replicas(metrics) == count

    try:
        metrics.wait("eight requests at once take four pods of two each", lambda: scaled_to(4))
    finally:
        load.end()
    load.paths = []
    metrics.wait("without load one pod is left", lambda: scaled_to(1))
