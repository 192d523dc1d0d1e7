"""Pods' figures through the aggregated API server: a real agent behind it, kube-apiserver's questions before it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent_process import AgentProcess, Guest, catalogue_directory, wait_until
from authority import Authority
from fake_kube_apiserver import FakeKubeApiserver

BASE = "/apis/custom.metrics.k8s.io/v1beta2"
WEB = {"namespace": "prod", "pod": "web-1", "uid": "7a0e8a0c-1c3e-4b0a-9c8b-111111111111"}


@dataclass
class Cluster:
    agent: AgentProcess
    agents: Authority
    api: FakeKubeApiserver
    proxy: Authority
    server: subprocess.Popen[bytes]
    port: int
    directory: Path

    def ask(self, target: str, authority: Authority | None = None, name: str = "front-proxy-client") -> tuple[int, Any]:
        """Ask as kube-apiserver does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.agents.certificate)
        if name:
            context.load_cert_chain(*(authority or self.proxy).issue(name))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=10)
        headers = {"X-Remote-User": "system:serviceaccount:kube-system:horizontal-pod-autoscaler"}
        try:
            connection.request("GET", target, headers={**headers, "X-Remote-Group": "system:authenticated"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def figure(self, metric: str, selector: str = "app%3Dweb") -> dict[str, str]:
        status, answer = self.ask(f"{BASE}/namespaces/prod/pods/*/{metric}?labelSelector={selector}")
        assert status == 200, answer
        return {item["describedObject"]["name"]: item["value"] for item in answer["items"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("autoscaling")
    agents, proxy = Authority(directory / "ca"), Authority(directory / "proxy", "front proxy")
    files = agents.files("remora-agent", "DNS:remora-agent")
    agent = AgentProcess(directory, models=catalogue_directory())
    tls = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--tls-ca", str(files.authorities)]
    port = free_port()
    agent.start(*tls, "--metrics", f"tls://127.0.0.1:{port}", "--metrics-client", "autoscaling")
    with ExitStack() as stack:
        stack.callback(agent.stop)
        api = stack.enter_context(FakeKubeApiserver())
        api.authentication = {
            "requestheader-client-ca-file": proxy.certificate.read_text(),
            "requestheader-allowed-names": '["front-proxy-client"]',
        }
        api.agents = [("127.0.0.1", port), ("127.0.0.1", free_port())]  # one node is down
        api.pods = {"web-1": {"app": "web"}, "web-2": {"app": "web"}, "other": {"app": "other"}}
        own, key = agents.issue("server", alternative="IP:127.0.0.1")
        mine, mine_key = agents.issue("autoscaling")
        ready_r, ready_w = os.pipe()
        command = ["--listen", "tls://127.0.0.1:0", "--tls-cert", str(own), "--tls-key", str(key)]
        command += ["--agents-of", "remora/agents", "--agent-ca", str(agents.certificate), "--agent-cert", str(mine)]
        command += ["--agent-key", str(mine_key), "--agent-name", "remora-agent", "--interval", "0.2", "--window", "1"]
        command += ["--api", api.url, "--api-token", str(api.token_file(directory)), "--ready-fd", str(ready_w)]
        with (directory / "server.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "remora", "autoscaling", *command], pass_fds=[ready_w], stderr=log
            )
        stack.callback(server.kill)
        os.close(ready_w)
        with os.fdopen(ready_r) as ready:
            address = ready.readline()
        assert address, (directory / "server.log").read_text()
        yield Cluster(agent, agents, api, proxy, server, int(address.rpartition(":")[2]), directory)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
        assert "Traceback" not in (directory / "server.log").read_text()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_discovery_is_answered_as_the_aggregator_and_its_availability_check_ask(cluster: Cluster) -> None:
    assert cluster.ask(BASE)[1]["kind"] == "APIResourceList"
    assert cluster.ask("/apis")[1]["kind"] == "APIGroupList"
    status, answer = cluster.ask("/openapi/v2")
    assert (status, answer["kind"], answer["reason"]) == (404, "Status", "NotFound")


def test_a_pods_load_is_seen_and_goes_when_it_ends(cluster: Cluster) -> None:
    path = cluster.agent.attach("prod.web-1.0a", labels=WEB)
    wait_until(lambda: cluster.figure("remora_requests_per_second") == {"web-1": "0"}, "an idle pod has figures")
    stop = threading.Event()

    def load() -> None:
        with Guest(cluster.agent.connect(path)) as guest:
            while not stop.is_set():
                guest.infer("identity")

    thread = threading.Thread(target=load)
    thread.start()
    try:

        def under_load() -> bool:
            rate = cluster.figure("remora_requests_per_second").get("web-1", "0")
            flying = cluster.figure("remora_inflight_requests").get("web-1", "0")
            device = cluster.figure("remora_device_seconds_per_second").get("web-1", "0")
            return thousandths(rate) > 5000 and thousandths(flying) > 100 and thousandths(device) > 0

        wait_until(under_load, "the load is seen", 15.0)
        assert cluster.figure("remora_requests_per_second", "app%3Dother") == {}
        one = cluster.ask(f"{BASE}/namespaces/prod/pods/web-1/remora_requests_per_second")[1]["items"]
        assert [item["describedObject"]["name"] for item in one] == ["web-1"]
    finally:
        stop.set()
        thread.join()
    wait_until(lambda: cluster.figure("remora_requests_per_second") == {"web-1": "0"}, "the load has gone")
    cluster.agent.detach("prod.web-1.0a")
    wait_until(lambda: cluster.figure("remora_requests_per_second") == {}, "the pod has gone")


def thousandths(quantity: str) -> int:
    return int(quantity[:-1]) if quantity.endswith("m") else int(quantity) * 1000


@pytest.mark.parametrize("who", ["nobody", "another authority's", "another name"])
def test_only_the_front_proxy_is_answered(cluster: Cluster, who: str) -> None:
    authority = cluster.agents if who == "another authority's" else cluster.proxy
    name = {"nobody": "", "another name": "somebody"}.get(who, "front-proxy-client")
    with pytest.raises((OSError, http.client.HTTPException)):
        cluster.ask(BASE, authority, name)


def test_an_agents_metrics_are_shown_to_no_other_holder_of_a_certificate(cluster: Cluster) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cluster.agents.certificate)
    context.check_hostname = False
    context.load_cert_chain(*cluster.agents.issue("tenant"))
    connection = http.client.HTTPSConnection("127.0.0.1", cluster.api.agents[0][1], context=context, timeout=10)
    connection.request("GET", "/metrics")
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.getresponse()
    connection.close()
    assert "metrics refused" in cluster.agent.log


def test_slow_and_silent_callers_hold_up_nobody(cluster: Cluster) -> None:
    silent = [socket.create_connection(("127.0.0.1", cluster.port)) for _ in range(300)]
    try:
        assert cluster.ask(BASE)[0] == 200
    finally:
        for sock in silent:
            sock.close()


def test_a_kube_apiserver_that_fails_is_told_so_and_the_server_goes_on(cluster: Cluster) -> None:
    target = f"{BASE}/namespaces/prod/pods/*/remora_queue_seconds?labelSelector=app%3Dweb"
    cluster.api.broken = True
    try:
        status, answer = cluster.ask(target)
        assert (status, answer["kind"]) == (503, "Status")
    finally:
        cluster.api.broken = False
    assert cluster.ask(target)[0] == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--agent", "ftp://x"], "no address to ask"),
        ([], "nothing says where the agents are"),
        (["--agent", "unix:///x", "--listen", "tcp://127.0.0.1:0"], "tls://host:port"),
        (["--agent", "unix:///x", "--interval", "9", "--window", "3"], "do not fit"),
        (["--agent", "unix:///x"], "--api URL"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_the_fix(options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "remora", "autoscaling", "--tls-cert", "/x", "--tls-key", "/x", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KUBERNETES_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    assert done.returncode
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
