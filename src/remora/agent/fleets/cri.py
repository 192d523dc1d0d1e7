"""Who a sandbox is to Kubernetes: its namespace, name and UID, from the annotations that containerd gives each sandbox.

containerd writes them into the bundle of every sandbox (`config.json`) before it starts the runtime, whichever that is,
so neither its API nor a kubelet need be asked. The bundle is root's: a pod cannot write to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: containerd's pkg/cri/annotations; CRI-O and others have their own.
_PREFIX = "io.kubernetes.cri.sandbox-"
_OWN_LABEL = "io.remora.label."
_TENANT = "io.remora.tenant"
_TASKS = "io.containerd.runtime.v2.task"
#: Where the CRI plugin keeps its pods; another namespace is asked only after it.
_KUBERNETES = "k8s.io"
#: Bounds of the agent (agent/attachments.py, agent/identity.py).
_MAX_NAME = 128
_MAX_LABEL = 200
_MAX_OWN_LABELS = 32
_MOST_BYTES = 4 << 20
#: The shortest part of an id that stands for it: Kata names Firecracker's directories by the first 32 characters.
SHORT_ID = 32


@dataclass(frozen=True, slots=True)
class Names:
    """What is known of a sandbox beyond its id: nothing, for one that containerd does not know."""

    sandbox: str
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    known: bool = False


def sandbox_name(annotations: Mapping[str, str], sandbox_id: str) -> str:
    """Return the name that the agent's metrics and commands show: `<namespace>.<pod>.<id>`, for others the id."""
    namespace, name = annotations.get(f"{_PREFIX}namespace", ""), annotations.get(f"{_PREFIX}name", "")
    short = re.sub(r"[^a-zA-Z0-9]", "", sandbox_id)[:8] or "x"
    if not name:
        return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"ctr.{sandbox_id}")[:_MAX_NAME]
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{namespace}.{name}")[: _MAX_NAME - 9] + f".{short}"


def labels(annotations: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return what policy may match: `namespace`, `pod` and `uid`, then `more`, then those that the operator let pass."""
    found = {
        name: annotations[f"{_PREFIX}{key}"][:_MAX_LABEL]
        for name, key in (("namespace", "namespace"), ("pod", "name"), ("uid", "uid"))
        if annotations.get(f"{_PREFIX}{key}")
    }
    for key, value in more.items():
        found.setdefault(key, value[:_MAX_LABEL])
    own = [(key.removeprefix(_OWN_LABEL), value) for key, value in annotations.items() if key.startswith(_OWN_LABEL)]
    for key, value in own[:_MAX_OWN_LABELS]:
        found.setdefault(key[:_MAX_LABEL], value[:_MAX_LABEL])
    return found


def tenant(annotations: Mapping[str, str]) -> str:
    """Return the tenant that an annotation names; empty for a tenant of its own."""
    return annotations.get(_TENANT, "")


class Bundles:
    """Reads containerd's bundles below its state directory. What was read of a sandbox stays true: it never changes."""

    def __init__(self, state: Path) -> None:
        self._tasks = state / _TASKS
        self._known: dict[str, tuple[Path, Names]] = {}

    def names(self, sandbox_id: str, fleet: str) -> Names:
        """Return the names of a sandbox by its id or the first 32 characters of it.

        One that containerd does not know has its id as its name.
        """
        known = self._known.get(sandbox_id)
        if known is not None:
            return known[1]
        more = {"fleet": fleet}
        for path in self._candidates(sandbox_id):
            annotations = _annotations(path)
            if annotations is not None:
                names = Names(
                    sandbox_name(annotations, path.parent.name),
                    tenant(annotations),
                    labels(annotations, more),
                    known=True,
                )
                self._known[sandbox_id] = path, names
                return names
        return Names(sandbox_id, labels=more)

    def _candidates(self, sandbox_id: str) -> Iterator[Path]:
        """Yield the `config.json` of what may be the sandbox's bundle; none if a short id could be several's."""
        try:
            namespaces = sorted((path.name for path in self._tasks.iterdir()), key=lambda name: name != _KUBERNETES)
        except OSError:
            return
        for namespace in namespaces:
            yield self._tasks / namespace / sandbox_id / "config.json"
            if len(sandbox_id) == SHORT_ID:
                found = list((self._tasks / namespace).glob(f"{sandbox_id}?*"))
                if len(found) == 1:
                    yield found[0] / "config.json"

    def keep(self, ids: set[str]) -> None:
        """Forget all sandboxes but these."""
        self._known = {key: value for key, value in self._known.items() if key in ids}


def _annotations(path: Path) -> dict[str, str] | None:
    """Return the annotations of a pod's sandbox; None if this is none, or not readable (yet)."""
    try:
        with path.open("rb") as file:
            config: Any = json.loads(file.read(_MOST_BYTES))
        found = config["annotations"]
        texts = {str(key): value for key, value in found.items() if isinstance(value, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return texts if texts.get(f"{_PREFIX}name") and texts.get(f"{_PREFIX}namespace") else None
