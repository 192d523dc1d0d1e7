"""What containerd knows of a sandbox, from its bundle: `config.json`, which it writes before it starts any runtime.

So neither its API nor a kubelet need be asked. The bundle is root's: no pod can write to it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.agent.fleets import cri

#: Below containerd's state directory (`state` in its configuration).
_TASKS = "io.containerd.runtime.v2.task"
#: Where the CRI plugin keeps pods; the others belong to `ctr`, `nerdctl`, Docker.
_KUBERNETES = "k8s.io"
_MOST_BYTES = 4 << 20
#: Kata's Go runtime names Firecracker's directories by so many characters of the sandbox's id.
SHORT_ID = 32


@dataclass(frozen=True, slots=True)
class Names:
    """Who a sandbox is. `id` is the whole one."""

    id: str
    sandbox: str
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: False: it asks to have no accelerator.
    wanted: bool = True


class Bundles:
    """Reads bundles below containerd's state directory. What was read of a sandbox stays true: it never changes."""

    def __init__(self, state: Path) -> None:
        self._tasks = state / _TASKS
        self._known: dict[tuple[str, bool], Names] = {}
        #: Container -> its sandbox, and the ids of grants that it carries, by key.
        self._carried: dict[str, tuple[str, Mapping[str, str]]] = {}

    def names(self, sandbox_id: str, *, short: bool = False) -> Names | None:
        """Return the names of a sandbox by its id, or by the beginning of it if that is all that is known (`short`).

        None: containerd knows no such sandbox, or several that begin so.
        """
        known = self._known.get((sandbox_id, short))
        if known is None:
            found = {path.parent.name: path for path in self._candidates(sandbox_id, short)}
            if len(found) != 1:
                return None
            ((whole, path),) = found.items()
            annotations = _annotations(path)
            if annotations is None or not _is_sandbox(annotations, whole, path.parent.parent.name):
                return None
            known = self._known[sandbox_id, short] = Names(
                whole,
                cri.sandbox_name(annotations, whole),
                cri.tenant(annotations),
                cri.labels(annotations),
                cri.wanted(annotations),
            )
        return known

    def look(self) -> None:
        """See which containers there are by now: `grants` is of the last look."""
        try:
            there = set(os.listdir(self._tasks / _KUBERNETES))
        except OSError:
            there = set()
        self._carried = {key: carried for key, carried in self._carried.items() if key in there}
        for container in there - self._carried.keys():
            annotations = _annotations(self._tasks / _KUBERNETES / container / "config.json")
            if annotations is not None:  # what containerd has written it does not change
                self._carried[container] = annotations.get(cri.SANDBOX_ID, ""), cri.grants(annotations)

    def grants(self, sandbox_id: str) -> frozenset[str]:
        """Return the ids of the grants that a sandbox's containers carry."""
        own = self._carried.get(sandbox_id, ("", {}))[1]
        return frozenset(
            value
            for sandbox, carried in self._carried.values()
            if carried and sandbox == sandbox_id
            for key, value in carried.items()
            if key not in own
        )

    def _candidates(self, sandbox_id: str, short: bool) -> Iterator[Path]:
        """Yield the `config.json` of what may be the sandbox's bundle, those of Kubernetes last: they count."""
        try:
            namespaces = sorted((path.name for path in self._tasks.iterdir()), key=lambda name: name == _KUBERNETES)
        except OSError:
            return
        for namespace in namespaces:
            pattern = f"{sandbox_id}*" if short and len(sandbox_id) == SHORT_ID else sandbox_id
            for bundle in (self._tasks / namespace).glob(pattern):
                if (bundle / "config.json").exists():
                    yield bundle / "config.json"

    def keep(self, ids: set[str]) -> None:
        """Forget all sandboxes but these."""
        self._known = {key: value for key, value in self._known.items() if key[0] in ids}


def _is_sandbox(annotations: Mapping[str, str], sandbox_id: str, namespace: str) -> bool:
    """False for another container of a pod, and for one whose annotations are of another sandbox."""
    if namespace != _KUBERNETES:
        # Names and labels of pods mean something in the CRI plugin's own namespace only.
        return not any(key.startswith(cri.PREFIX) for key in annotations)
    return annotations.get(cri.CONTAINER_TYPE) == "sandbox" and annotations.get(cri.SANDBOX_ID) == sandbox_id


def _annotations(path: Path) -> dict[str, str] | None:
    """Return a bundle's annotations; None if it cannot be read (yet), or others than root may have written it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            config: Any = json.loads(file.read(_MOST_BYTES))
        found = config.get("annotations") or {}
        return {key: value for key, value in found.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
