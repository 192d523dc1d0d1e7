"""A small real Kubernetes that runs pods: a control plane on this machine, and nodes in network namespaces.

It all lies in temporary folders and listens on a bridge that is made for it. As a program it runs a cluster of one bare
node for whoever wants one, and for the tests that take one by KUBECONFIG:

    make image
    .venv/bin/python tests/support/kubernetes_cluster.py     # says what to set; Ctrl-C ends it
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import kubernetes_binaries
import run_leftovers
from api_only_cluster import ApiOnlyCluster
from cluster_objects import add_dns_image, dns
from kubernetes_client import is_ready
from kubernetes_node import Node
from node_network import NodeNetwork
from pod_agent import add_service_image


class Cluster(ApiOnlyCluster):
    """`with Cluster(binaries) as cluster:` runs one; at its end nothing of it is left."""

    def __init__(self, binaries: Mapping[str, Path], nodes: int = 2, *, remora: bool = True) -> None:
        self._network = NodeNetwork()
        super().__init__(binaries, run_leftovers.directory("remora-kube-", self._network.bridge), self._network.address)
        self._count = nodes
        self._remora = remora
        self.nodes: list[Node] = []

    def start(self) -> None:
        self._network.start()
        proxy = self.add_user("system:kube-proxy")
        scheduler = self.add_user("system:kube-scheduler")
        names = [f"remora-node-{index}" for index in range(self._count)]
        kubelets = [self.add_user(f"system:node:{name}", "system:nodes") for name in names]
        super().start()
        self.run("kube-scheduler", f"--kubeconfig={scheduler}", "--leader-elect=false", "--secure-port=0")
        for index, kubelet in enumerate(kubelets):
            node = Node(index, self.binaries, self._network, remora=self._remora)
            self.nodes.append(node)
            node.start(kubelet, proxy)
        self.wait("all nodes are ready", self.all_nodes_ready)

    def add_images(self) -> None:
        """Give the nodes the images of the service and of DNS, and start DNS."""
        for node in self.nodes:
            add_dns_image(node.containerd, self.binaries["coredns"])
            with tempfile.TemporaryDirectory() as scratch:
                add_service_image(node.containerd, Path(scratch))
        self.apply(*dns())
        self.wait("DNS", lambda: self.ready_pods("k8s-app=kube-dns", "kube-system"))

    def all_nodes_ready(self) -> bool:
        nodes = self.get("nodes")["items"]
        return len(nodes) == self._count and all(is_ready(node) for node in nodes)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def leftovers(self) -> list[str]:
        """Return what pods have on any node."""
        return [f"{node.name}: {line}" for node in self.nodes for line in node.leftovers()]

    def tails(self) -> str:
        return "\n".join([super().tails(), *(node.tails() for node in self.nodes)])

    def close(self) -> None:
        if sys.exc_info()[0] is not None:
            print(self.tails(), file=sys.stderr)
        for node in reversed(self.nodes):
            node.close()
        super().close()
        self._network.close()
        shutil.rmtree(self.directory)


def lend(image: Path) -> None:
    """Run a cluster of a node that knows runc alone, with the agent's image on it, until SIGINT or SIGTERM."""
    ended = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: ended.set())
    with Cluster(kubernetes_binaries.build(), nodes=1, remora=False) as cluster:
        (node,) = cluster.nodes
        node.containerd.import_archive(image)
        cluster.add_images()
        values = cluster.directory / "values.yaml"
        # There is no systemd; what it would be asked for is done below.
        values.write_text("installer: {restart: false}\n")
        print(f"export KUBECONFIG={cluster.kubeconfig} REMORA_TEST_VALUES={values}", flush=True)
        config = node.spaces.path("/etc/containerd/config.toml")
        known = config.read_bytes()
        while not ended.wait(1):
            with contextlib.suppress(FileNotFoundError):
                if (now := config.read_bytes()) != known:
                    known = now
                    node.containerd.kill(signal.SIGTERM)
                    node.containerd.start()


if __name__ == "__main__":
    lend(Path(__file__).parents[2] / "build" / "remora-agent.tar")
