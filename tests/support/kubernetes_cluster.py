"""A small real Kubernetes that runs pods: a control plane on this machine, and nodes in network namespaces.

It all lies in temporary folders and listens on a bridge that is made for it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from api_only_cluster import ApiOnlyCluster
from kubernetes_node import Node
from node_network import NodeNetwork


class Cluster(ApiOnlyCluster):
    """`with Cluster(binaries) as cluster:` runs one; at its end nothing of it is left."""

    def __init__(self, binaries: Mapping[str, Path], nodes: int = 2, *, remora: bool = True) -> None:
        self._network = NodeNetwork()
        super().__init__(binaries, Path(tempfile.mkdtemp(prefix="remora-kube-")), self._network.address)
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

    def ready_pods(self, selector: str, namespace: str = "default") -> list[dict[str, Any]]:
        items = self.get("pods", "-n", namespace, "-l", selector)["items"]
        return [pod for pod in items if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]

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


def is_ready(thing: Mapping[str, Any]) -> bool:
    conditions: Sequence[Mapping[str, str]] = thing.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
