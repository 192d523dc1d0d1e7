"""How a pod is known to the node agent: its namespace and name, and what Kubernetes (never the pod) says of it."""

from __future__ import annotations

import re
from typing import Any

from remora.sandboxes.launch import AttachSpec
from remora.shim import settings as runtime

_PREFIX = "io.kubernetes.cri.sandbox-"
_OWN_LABEL = "io.remora.label."
#: Labels that only Kubernetes may set. Of the service account nothing is known: a pod may mount a token that it has
#: written itself where its own would be, and nobody here can check a signature.
_RESERVED = ("namespace", "pod", "uid", "service_account")
#: Where the kubelet has the device plugin's grants put (kube/shares.py). A pod's author cannot write there: containerd
#: passes a pod's own annotations below other prefixes, and an id that is not the plugin's grants nothing.
_GRANT = "grant.remora.dev/"
#: Bounds of the agent (agent/attachments.py, agent/identity.py).
_MAX_NAME = 128
_MAX_LABEL = 200


def wanted(settings: runtime.Settings, config: dict[str, Any]) -> bool:
    """True if the pod is to have an accelerator."""
    asked = (config.get("annotations") or {}).get("io.remora.accelerator", "true")
    return settings.accelerator and asked.lower() not in ("false", "no", "off", "0")


def attach_spec(settings: runtime.Settings, sandbox: dict[str, Any], container: dict[str, Any]) -> AttachSpec:
    """Return the attachment of a pod.

    A tenant that a pod names is one of its namespace, as whoever writes a pod is trusted in its namespace only.

    Args:
        sandbox: config.json of the pod's sandbox.
        container: config.json of its first container.
    """
    annotations = {**(container.get("annotations") or {}), **(sandbox.get("annotations") or {})}
    labels = {
        name: annotations[f"{_PREFIX}{key}"][:_MAX_LABEL]
        for name, key in (("namespace", "namespace"), ("pod", "name"), ("uid", "uid"))
        if annotations.get(f"{_PREFIX}{key}")
    }
    for key, value in annotations.items():
        if key.startswith(_OWN_LABEL) and key[len(_OWN_LABEL) :] not in _RESERVED:
            labels[key[len(_OWN_LABEL) :]] = value[:_MAX_LABEL]
    tenant = annotations.get("io.remora.tenant", "")
    if tenant and "namespace" in labels:
        # No namespace has a dot in its name (RFC 1123 label), so that no two pairs make the same tenant.
        tenant = f"{labels['namespace']}.{tenant}"
    return AttachSpec(
        runtime.control_socket(settings), tenant, tuple(sorted(labels.items())), grants=grants(sandbox, container)
    )


def grants(sandbox: dict[str, Any], container: dict[str, Any]) -> tuple[str, ...]:
    """Return the ids of the grants that a container carries.

    What the sandbox has, too, came with the pod: then containerd was told to pass what pods' authors write.
    """
    own = sandbox.get("annotations") or {}
    annotations = container.get("annotations") or {}
    return tuple(
        value[:_MAX_LABEL] for key, value in sorted(annotations.items()) if key.startswith(_GRANT) and key not in own
    )


def sandbox_name(config: dict[str, Any], sandbox_id: str) -> str:
    """Return the name that the agent's metrics and commands show: `<namespace>.<pod>.<id>`, for others the id."""
    annotations = config.get("annotations") or {}
    namespace, name = annotations.get(f"{_PREFIX}namespace", ""), annotations.get(f"{_PREFIX}name", "")
    short = re.sub(r"[^a-zA-Z0-9]", "", sandbox_id)[:8] or "x"
    if not name:
        return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"ctr.{sandbox_id}")[:_MAX_NAME]
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{namespace}.{name}")[: _MAX_NAME - 9] + f".{short}"
