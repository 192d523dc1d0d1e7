"""A real cluster for each module of this folder: `make test-kubernetes`. None of `make test`: the first run builds
Kubernetes from its modules, which takes a while. With KUBECONFIG the chart's module runs in that cluster, and no other
does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import kubernetes_binaries
from cluster_objects import RUNTIME_CLASS
from containerd_process import missing
from kubernetes_cluster import Cluster
from pod_agent import Agent
from remora import paths
from remora.sandboxes.guest_files import guest_files

#: What the agents of the nodes allow: everything, but not to everyone.
POLICY = """\
[[label]]
match = { namespace = "restricted" }
operations = ["infer"]
"""


@pytest.fixture(scope="session")
def asked_for() -> None:
    if not os.environ.get("REMORA_TEST_KUBERNETES"):
        pytest.skip("a real Kubernetes is for `make test-kubernetes`")


@pytest.fixture(scope="session")
def none_given(asked_for: None) -> None:
    """Skip what would harm a cluster that somebody gave, and what has its own control plane."""
    if os.environ.get("KUBECONFIG"):
        pytest.skip(
            "it kills and looks into parts of a cluster, which it does to one of its own alone: unset KUBECONFIG"
        )


@pytest.fixture(scope="session")
def binaries(none_given: None) -> dict[str, Path]:
    """The programs of a cluster of the tests' own; what they need is there."""
    lacking = missing()
    if lacking:
        pytest.skip(f"the cluster needs {', '.join(lacking)}: run scripts/system-packages.sh as root")
    guest_files(paths.state_dir())
    return kubernetes_binaries.build()


@pytest.fixture(scope="module")
def cluster(binaries: dict[str, Path]) -> Iterator[Cluster]:
    """Two nodes, kube-proxy, DNS, the runtime class, and the service's image."""
    with Cluster(binaries) as one:
        one.add_images()
        one.apply(RUNTIME_CLASS)
        yield one


@pytest.fixture(scope="module")
def agents(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Agent]]:
    """The agent of each node, by the node's name."""
    found: dict[str, Agent] = {}
    for node in cluster.nodes:
        directory = tmp_path_factory.mktemp(f"agent-{node.name}")
        policy = directory / "agent.toml"
        policy.write_text(POLICY)
        found[node.name] = Agent(node.containerd, directory / "state", "--config", str(policy))
        found[node.name].start()
    yield found
    for agent in found.values():
        agent.stop()
