"""How a pod is known to the node agent: its namespace and name, and what Kubernetes (never the pod) says of it."""

from __future__ import annotations

import json
import re
from binascii import Error, a2b_base64
from pathlib import Path
from typing import Any

from remora.sandboxes.launch import AttachSpec
from remora.shim import settings as runtime

_PREFIX = "io.kubernetes.cri.sandbox-"
_OWN_LABEL = "io.remora.label."
_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Bounds of the agent (agent/attachments.py, agent/identity.py).
_MAX_NAME = 128
_MAX_LABEL = 200


def wanted(settings: runtime.Settings, config: dict[str, Any]) -> bool:
    """True if the pod is to have an accelerator."""
    asked = (config.get("annotations") or {}).get("io.remora.accelerator", "true")
    return settings.accelerator and asked.lower() not in ("false", "no", "off", "0")


def attach_spec(settings: runtime.Settings, sandbox: dict[str, Any], container: dict[str, Any]) -> AttachSpec:
    """Return the attachment of a pod.

    Args:
        sandbox: config.json of the pod's sandbox.
        container: config.json of its first container, whose token names the service account.
    """
    annotations = {**(container.get("annotations") or {}), **(sandbox.get("annotations") or {})}
    labels = {
        name: annotations[f"{_PREFIX}{key}"][:_MAX_LABEL]
        for name, key in (("namespace", "namespace"), ("pod", "name"), ("uid", "uid"))
        if annotations.get(f"{_PREFIX}{key}")
    }
    account = service_account(container)
    if account:
        labels["service_account"] = account[:_MAX_LABEL]
    for key, value in annotations.items():
        if key.startswith(_OWN_LABEL) and key[len(_OWN_LABEL) :] not in labels:
            labels[key[len(_OWN_LABEL) :]] = value[:_MAX_LABEL]
    return AttachSpec(
        runtime.control_socket(settings), annotations.get("io.remora.tenant", ""), tuple(sorted(labels.items()))
    )


def sandbox_name(config: dict[str, Any], sandbox_id: str) -> str:
    """Return the name that the agent's metrics and commands show: `<namespace>.<pod>.<id>`, for others the id."""
    annotations = config.get("annotations") or {}
    namespace, name = annotations.get(f"{_PREFIX}namespace", ""), annotations.get(f"{_PREFIX}name", "")
    short = re.sub(r"[^a-zA-Z0-9]", "", sandbox_id)[:8] or "x"
    if not name:
        return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"ctr.{sandbox_id}")[:_MAX_NAME]
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{namespace}.{name}")[: _MAX_NAME - 9] + f".{short}"


def service_account(container: dict[str, Any]) -> str:
    """Return the service account by the token that the kubelet has put into the container; empty if there is none.

    The token is read from the kubelet's own directory on the host, so its signature need not be checked.
    """
    for mount in container.get("mounts") or []:
        if mount.get("destination") == _TOKEN:
            try:
                part = (Path(mount["source"]) / "token").read_text().split(".")[1]
                claims = json.loads(a2b_base64(part.replace("-", "+").replace("_", "/") + "=" * (-len(part) % 4)))
                return str(claims["kubernetes.io"]["serviceaccount"]["name"])
            except (OSError, IndexError, KeyError, TypeError, ValueError, Error):
                return ""
    return ""
