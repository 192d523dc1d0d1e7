"""Pods: which one a process runs in, by its cgroup, and what the node knows of it.

The kubelet gives every pod a cgroup named after its UID, with one below it for each container. The path is trusted only
from the hierarchy's root on, because whoever has a cgroup of his own can make others of any name below it.

Names are another matter: only Kubernetes knows a pod's namespace, name and labels. Whoever starts pods on the node
writes them down as `<run-time directory>/pods/<uid>.json`; the agent reads the file when the pod first connects.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remora.agent.identity import Identity, check_name
from remora.errors import RemoraError, UnauthenticatedError

_UID = r"[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_CONTAINER = r"(?:[a-z][a-z-]*[-:])?(?P<container>[0-9a-f]{64})(?:\.scope)?(?:/|$)"
#: Where the kubelet puts pods: with the cgroupfs driver /kubepods[/class]/pod<uid>, with systemd
#: /kubepods.slice[/kubepods-class.slice]/kubepods[-class]-pod<uid>.slice; below either the container's, or after the
#: slice's name as `:cri-containerd:<id>` (kubernetes/kubernetes, pkg/kubelet/cm).
_CGROUPFS = re.compile(rf"/kubepods(?:/(?:burstable|besteffort))?/pod(?P<uid>{_UID})(?:/{_CONTAINER}|/|$)")
_SYSTEMD = re.compile(
    r"/kubepods\.slice(?:/kubepods-(?:burstable|besteffort)\.slice)?"
    rf"/kubepods(?:-(?:burstable|besteffort))?-pod(?P<uid>{_UID})\.slice(?:[:/]{_CONTAINER}|[:/]|$)"
)
_MOST_BYTES = 64 << 10
_MOST_LABELS = 64


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's UID as Kubernetes writes it, and the container's id, empty where the path does not tell."""

    uid: str
    container: str = ""


@dataclass(frozen=True, slots=True)
class PodNames:
    """What the node knows of a pod beyond its UID."""

    namespace: str = ""
    name: str = ""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


#: Returns the names of a pod by its UID, None if nobody wrote them down. Raises UnauthenticatedError.
Resolve = Callable[[str], "PodNames | None"]


def pod_of(cgroups: str) -> Pod | None:
    """Return the pod that a process with these cgroups (cgroups(7)) belongs to; None for a process of the host.

    Raises:
        UnauthenticatedError: the agent sees cgroups from inside one, or the hierarchies disagree.
    """
    found: set[Pod] = set()
    for line in cgroups.splitlines():
        path = line.split(":", 2)[-1]
        if path.startswith("/.."):
            raise UnauthenticatedError(
                "the agent runs in a cgroup namespace and cannot tell whose cgroup the caller's is",
                fix="run the agent in the host's cgroup namespace",
            )
        match = _CGROUPFS.match(path) or _SYSTEMD.match(path)
        if match is not None:
            found.add(Pod(match["uid"].replace("_", "-"), match["container"] or ""))
    if len({pod.uid for pod in found}) > 1:
        raise UnauthenticatedError("the caller's cgroups belong to several pods", fix="see its /proc/<pid>/cgroup")
    return max(found, key=lambda pod: pod.container, default=None)


class PodFiles:
    """Names that somebody wrote into files of a directory (a `Resolve`). A file is read again when it has changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, tuple[tuple[int, int], PodNames]] = {}

    def __call__(self, uid: str) -> PodNames | None:
        path = self._directory / f"{uid}.json"
        try:
            # A directory that others may write to would let them rename themselves.
            _check_owner(self._directory, self._directory.lstat())
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            self._known.pop(uid, None)
            return None
        except OSError as error:
            raise UnauthenticatedError(f"{path}, which names the caller's pod, is not usable: {error}") from error
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            _check_owner(path, status)
            stamp = (status.st_ino, status.st_mtime_ns)
            known = self._known.get(uid)
            if known is not None and known[0] == stamp:
                return known[1]
            names = _parse(path, file.read(_MOST_BYTES + 1))
        if len(self._known) >= 4096:
            self._known.clear()
        self._known[uid] = (stamp, names)
        return names


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnauthenticatedError(
            f"others than root and the agent's user may write {path}", fix=f"chown root {path}; chmod go-w {path}"
        )


def _parse(path: Path, data: bytes) -> PodNames:
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        value = json.loads(data)
        texts = {key: value.get(key, "") for key in ("namespace", "name", "tenant")}
        labels = value.get("labels", {})
        if not all(isinstance(text, str) for text in (*texts.values(), *labels, *labels.values())):
            raise ValueError("names and labels are texts")
        if len(labels) > _MOST_LABELS:
            raise ValueError(f"it has more than {_MOST_LABELS} labels")
        if texts["tenant"]:
            check_name("tenant", texts["tenant"])
    except (ValueError, AttributeError, TypeError, RecursionError, RemoraError) as error:
        raise UnauthenticatedError(
            f"{path}, which names the caller's pod, cannot be read: {error}", fix="see docs/agent.md, Pods"
        ) from error
    return PodNames(texts["namespace"], texts["name"], texts["tenant"], labels)


def of_pod(pod: Pod, names: PodNames | None) -> Identity:
    """Return the identity of every process in a pod. One without a tenant is a tenant of its own, as a sandbox is.

    Rules by label may also match `uid`, `namespace` and `pod`, as for pods in microVMs; no label of the pod's own can
    set them.
    """
    key = f"pod:{pod.uid}"
    if names is None:
        return Identity(key, key, labels={"uid": pod.uid})
    labels = {**names.labels, "namespace": names.namespace, "pod": names.name, "uid": pod.uid}
    tenant = f"tenant:{names.tenant}" if names.tenant else key
    return Identity(key, tenant, f"{names.namespace}/{names.name}".strip("/"), labels)
