"""Who a pod's sandbox is, by the annotations that containerd gives it: Kubernetes says them, never the pod.

One set of rules for pods of Remora's own runtime and for those of others. No imports: the shim starts with this.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: containerd's pkg/cri/annotations; written after those that a pod's author may pass.
PREFIX = "io.kubernetes.cri.sandbox-"
SANDBOX_ID = f"{PREFIX}id"
CONTAINER_TYPE = "io.kubernetes.cri.container-type"
#: Where the kubelet has the device plugin's grants put (kube/shares.py), in containers' annotations. A pod's author
#: cannot write there: containerd passes a pod's own annotations below other prefixes, and an id that is not the
#: plugin's grants nothing.
_GRANT = "grant.remora.dev/"
#: nerdctl's pkg/labels: the name that `nerdctl run --name` gave.
_NERDCTL_NAME = "nerdctl/name"
_OWN_LABEL = "io.remora.label."
#: Labels that only Kubernetes and the agent may set. Of the service account nothing is known: a pod may mount a token
#: that it has written itself where its own would be, and nobody here can check a signature.
_RESERVED = ("namespace", "pod", "uid", "service_account", "fleet")
#: Bounds of the agent (agent/attachments.py, agent/identity.py).
_MAX_NAME = 128
MAX_LABEL = 200
_MAX_OWN_LABELS = 32


def wanted(annotations: Mapping[str, str]) -> bool:
    """True unless the pod asks to have no way to the agent."""
    return annotations.get("io.remora.accelerator", "true").lower() not in ("false", "no", "off", "0")


def sandbox_name(annotations: Mapping[str, str], sandbox_id: str) -> str:
    """Return the name that the agent's metrics and commands show: `<namespace>.<pod>.<id>`, for others `ctr.<id>`."""
    namespace, name = annotations.get(f"{PREFIX}namespace", ""), annotations.get(f"{PREFIX}name", "")
    short = re.sub(r"[^a-zA-Z0-9]", "", sandbox_id)[:8] or "x"
    if not name and _NERDCTL_NAME in annotations:
        namespace, name = "ctr", annotations[_NERDCTL_NAME]
    if not name:
        return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"ctr.{sandbox_id}")[:_MAX_NAME]
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{namespace}.{name}")[: _MAX_NAME - 9] + f".{short}"


def labels(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return what policy may match: `namespace`, `pod` and `uid`, then those that the operator let pass."""
    found = {
        name: annotations[f"{PREFIX}{key}"][:MAX_LABEL]
        for name, key in (("namespace", "namespace"), ("pod", "name"), ("uid", "uid"))
        if annotations.get(f"{PREFIX}{key}")
    }
    own = [(key[len(_OWN_LABEL) :], value) for key, value in annotations.items() if key.startswith(_OWN_LABEL)]
    for key, value in own[:_MAX_OWN_LABELS]:
        if key not in _RESERVED:
            found[key] = value[:MAX_LABEL]
    return found


def tenant(annotations: Mapping[str, str]) -> str:
    """Return the tenant that an annotation names; empty for a tenant of its own.

    It is one of the pod's namespace, as whoever writes a pod is trusted in its namespace only. No namespace has a dot
    in its name (RFC 1123 label), so that no two pairs make the same tenant.
    """
    named, namespace = annotations.get("io.remora.tenant", ""), annotations.get(f"{PREFIX}namespace", "")
    return f"{namespace[:MAX_LABEL]}.{named}" if named and namespace else named


def grants(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return the ids of grants among a container's annotations, by key. Those of a sandbox came with its pod: then
    containerd was told to pass what pods' authors write, and the same keys of its containers count no more."""
    return {key: value[:MAX_LABEL] for key, value in sorted(annotations.items()) if key.startswith(_GRANT)}
