"""The chart in a cluster: installed under a name and into a namespace of its own, and gone from it again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kubernetes_client import KubernetesClient

CHART = Path(__file__).parents[2] / "charts" / "remora"
#: Where something of the chart, or of what tests give the cluster, may be.
_KINDS = (
    "all,namespaces,clusterroles,clusterrolebindings,roles,rolebindings,runtimeclasses,configmaps,secrets,"
    "serviceaccounts,networkpolicies,apiservices,poddisruptionbudgets,endpointslices,persistentvolumeclaims"
)
_INSTANCE = "app.kubernetes.io/instance"


class Release(KubernetesClient):
    """One release; commands are about its namespace, which it makes and deletes.

    Args:
        helm, kubectl: the programs.
        values: what the cluster wants of the chart, as `--set` takes it.
        files: the same as files.
    """

    def __init__(
        self, helm: Path, kubectl: Path, kubeconfig: str, values: Sequence[str], files: Sequence[str] = ()
    ) -> None:
        self.name = f"remora-test-{secrets.token_hex(3)}"
        super().__init__(kubectl, kubeconfig, self.name)
        self._helm = helm
        self._values = [word for file in files for word in ("--values", file)]
        self._values += [word for value in values for word in ("--set", value)]

    def helm(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(self._helm), f"--namespace={self.name}", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, *values: str) -> str:
        return self.helm("install", self.name, str(CHART), "--create-namespace", *self._settings(values))

    def upgrade(self, *values: str) -> str:
        return self.helm("upgrade", self.name, str(CHART), *self._settings(values))

    def _settings(self, values: Sequence[str]) -> list[str]:
        return [*self._values, *(word for value in values for word in ("--set", value))]

    def nodes_are_set_up(self) -> bool:
        """Tell whether the installer has ended on every node, in this state of the chart."""
        wanted = [one["status"] for one in self.get("daemonsets")["items"]]
        pods = self.get("pods", "-l", "app.kubernetes.io/component=agent")["items"]
        pods = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        ended = [
            any(one["type"] == "Initialized" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
            for pod in pods
        ]
        return all(ended) and 0 < len(ended) == sum(one["desiredNumberScheduled"] for one in wanted)

    def is_ready(self) -> bool:
        """Tell whether every part of the chart is."""
        parts = [one["status"] for one in self.get("daemonsets,deployments", "-l", f"{_INSTANCE}={self.name}")["items"]]
        wanted = [part.get("desiredNumberScheduled", part.get("replicas", 0)) for part in parts]
        ready = [part.get("numberReady", part.get("readyReplicas", 0)) for part in parts]
        return all(wanted) and wanted == ready

    def uninstall(self) -> None:
        """Take the chart and the namespace away."""
        self.helm("uninstall", self.name, "--wait")
        self.kubectl("delete", "namespace", self.name)

    def traces(self) -> list[str]:
        """Return what the cluster has of this release, anywhere."""
        found = json.loads(self.kubectl("get", _KINDS, "-A", "-o", "json"))["items"]
        traces = []
        for one in found:
            metadata = one["metadata"]
            labels = metadata.get("labels") or {}
            ours = self.name in (metadata.get("namespace"), labels.get(_INSTANCE)) or self.name in metadata["name"]
            if ours:
                traces.append(f"{one['kind']} {metadata.get('namespace', '')}/{metadata['name']}")
        return traces

    def clear(self) -> None:
        """Take away what a test that failed has left, the nodes' installation included."""
        if not self.traces():
            return
        with contextlib.suppress(AssertionError, RuntimeError):
            self.kubectl("delete", "hpa,deployment,service,pod", "--all", "--wait")
            self.upgrade("installer.action=uninstall")
            self.wait("the nodes are as before", self.nodes_are_set_up)
        with contextlib.suppress(AssertionError):
            self.helm("uninstall", self.name, "--wait")
        self.kubectl("delete", "namespace", self.name, "--ignore-not-found")


def refusal(cluster: KubernetesClient) -> str:
    """Return why the chart cannot be tried in this cluster; empty: it can.

    The runtime is installed once on a node, and nothing that is there already may be touched.
    """
    for runtime in cluster.get("runtimeclasses")["items"]:
        if runtime["handler"] == "remora":
            return f"the cluster has Remora already (RuntimeClass {runtime['metadata']['name']}): uninstall its chart"
    return ""


def has_custom_metrics(cluster: KubernetesClient) -> bool:
    """Tell whether the cluster has a server of `custom.metrics.k8s.io` already: there is one."""
    names = [one["metadata"]["name"] for one in cluster.get("apiservices")["items"]]
    return any(name.endswith(".custom.metrics.k8s.io") for name in names)


def values_of_environment() -> tuple[list[str], list[str]]:
    """Return `--set` values and files of values that the caller of the tests wants of the chart."""
    image = os.environ.get("REMORA_TEST_IMAGE", "")
    repository, _, tag = image.rpartition(":")
    values = [f"image.repository={repository}", f"image.tag={tag}"] if repository else []
    return values, [file for file in os.environ.get("REMORA_TEST_VALUES", "").split(os.pathsep) if file]
