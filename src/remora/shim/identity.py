"""How a pod is known to the node agent: its namespace and name, and what Kubernetes (never the pod) says of it."""

from __future__ import annotations

from typing import Any

from remora.agent.fleets import cri
from remora.sandboxes.launch import AttachSpec
from remora.shim import settings as runtime


def wanted(settings: runtime.Settings, config: dict[str, Any]) -> bool:
    """True if the pod is to have an accelerator."""
    return settings.accelerator and cri.wanted(config.get("annotations") or {})


def attach_spec(settings: runtime.Settings, sandbox: dict[str, Any], container: dict[str, Any]) -> AttachSpec:
    """Return the attachment of a pod.

    Args:
        sandbox: config.json of the pod's sandbox.
        container: config.json of its first container.
    """
    annotations = {**(container.get("annotations") or {}), **(sandbox.get("annotations") or {})}
    return AttachSpec(
        runtime.control_socket(settings),
        cri.tenant(annotations),
        tuple(sorted(cri.labels(annotations).items())),
        grants=grants(sandbox, container),
    )


def grants(sandbox: dict[str, Any], container: dict[str, Any]) -> tuple[str, ...]:
    """Return the ids of the grants that a container carries."""
    own = cri.grants(sandbox.get("annotations") or {})
    found = cri.grants(container.get("annotations") or {})
    return tuple(value for key, value in found.items() if key not in own)


def sandbox_name(config: dict[str, Any], sandbox_id: str) -> str:
    """Return the name that the agent's metrics and commands show."""
    return cri.sandbox_name(config.get("annotations") or {}, sandbox_id)
