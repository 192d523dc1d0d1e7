"""The objects that tests give a cluster: the classification service in microVMs, and the cluster's DNS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from container_images import file_layer
from containerd_process import Containerd
from node_network import DNS_SERVICE
from pod_agent import IMAGE

RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "remora"},
    "handler": "remora",
    "overhead": {"podFixed": {"memory": "120Mi", "cpu": "10m"}},
}
DNS_IMAGE = "localhost/remora/coredns:1"
_COREFILE = """\
.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa {
        pods insecure
    }
    cache 5
    loadbalance
}
"""


def deployment(
    name: str, replicas: int, *, namespace: str = "default", pod: dict[str, Any] | None = None, **container: Any
) -> dict[str, Any]:
    """Return a Deployment of one container per microVM."""
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "runtimeClassName": "remora",
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 2,
                    **(pod or {}),
                    "containers": [{"name": "main", "imagePullPolicy": "Never", **container}],
                },
            },
        },
    }


def classification(replicas: int, namespace: str = "default", *, shares: int = 0, image: str = IMAGE) -> dict[str, Any]:
    """Return the Deployment of the classification service, which ends without losing a request.

    Args:
        shares: of the node's processors (`remora.dev/cpu`), for each pod.
        image: the service's; pulled where a node has it not.
    """
    limits = {"memory": "256Mi", "cpu": "1", **({"remora.dev/cpu": str(shares)} if shares else {})}
    probe = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "timeoutSeconds": 5}
    return deployment(
        "classify",
        replicas,
        namespace=namespace,
        # Longer than the service takes its leave.
        pod={"terminationGracePeriodSeconds": 30},
        image=image,
        imagePullPolicy="IfNotPresent",
        ports=[{"containerPort": 8080}],
        readinessProbe={**probe, "failureThreshold": 2},
        resources={"limits": limits, "requests": {"memory": "64Mi", "cpu": "50m"}},
    )


def block_volume(name: str, device: str, node: str, size: str) -> list[dict[str, Any]]:
    """Return a PersistentVolume that is a block device of a node, and the claim to it."""
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    common = {"accessModes": ["ReadWriteOnce"], "volumeMode": "Block", "storageClassName": "by-hand"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                **common,
                "capacity": {"storage": size},
                "persistentVolumeReclaimPolicy": "Retain",
                "local": {"path": device},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {**common, "volumeName": name, "resources": {"requests": {"storage": size}}},
        },
    ]


def service(name: str = "classify", namespace: str = "default") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]},
    }


def autoscaler(metric: str, per_pod: str, most: int, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    """Return a HorizontalPodAutoscaler of `classify`: 1 to `most` pods, by a metric of the agents."""
    target = {"type": "AverageValue", "averageValue": per_pod}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "classify", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "classify"},
            "minReplicas": 1,
            "maxReplicas": most,
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}],
            **spec,
        },
    }


def add_dns_image(containerd: Containerd, binary: Path) -> None:
    layer = file_layer({"coredns": binary.read_bytes()}, mode=0o755)
    containerd.add_image(DNS_IMAGE, [layer], Entrypoint=["/coredns"], Cmd=[])


def dns() -> list[dict[str, Any]]:
    """Return CoreDNS as clusters have it: under its own service account, behind the address that pods ask."""
    metadata = {"name": "coredns", "namespace": "kube-system"}
    labels = {"k8s-app": "kube-dns"}
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    container = {
        "name": "coredns",
        "image": DNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 2},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
        "resources": {"limits": {"memory": "170Mi"}, "requests": {"cpu": "20m", "memory": "70Mi"}},
    }
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "serviceAccountName": "coredns",
            "dnsPolicy": "Default",
            "containers": [container],
            "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
        },
    }
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"}
    ports = [{"name": name, "port": 53, "protocol": name.upper()} for name in ("udp", "tcp")]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", **metadata}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"Corefile": _COREFILE}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {**metadata, "labels": labels},
            "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": DNS_SERVICE, "selector": labels, "ports": ports},
        },
    ]
