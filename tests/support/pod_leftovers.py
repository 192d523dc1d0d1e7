"""Finds what is left of a pod anywhere on the host, in the kernel's own lists."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from containerd_process import Containerd
from cri_client import Pod


def record(containerd: Containerd, pod: Pod) -> dict[str, object]:
    for state in containerd.runtime.glob("s/*/state.json"):
        fields: dict[str, object] = json.loads(state.read_text())
        if fields["container"] == pod.id:
            return fields
    raise AssertionError("the pod has no record")


def leftovers(containerd: Containerd, pod: Pod) -> list[str]:
    """Return what is left of a pod anywhere on the host."""
    found = [f"file {path}" for path in containerd.runtime.glob("s/*") if _mentions(path, pod.id)]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = process.read_bytes()
            if pod.id.encode() in text:
                found.append(f"process {process.parent.name}: {text[:80]!r}")
    found += [
        f"mount {line.split()[1]}" for line in Path("/proc/self/mounts").read_text().splitlines() if pod.id in line
    ]
    # Not by glob, which fails where others remove groups meanwhile.
    found += [f"cgroup {folder}/{pod.id}" for folder, below, _ in os.walk("/sys/fs/cgroup") if pod.id in below]
    found += [f"bundle {path}" for path in containerd.base.glob(f"state/io.containerd.runtime.v2.task/*/{pod.id}")]
    return found


def netns_of(containerd: Containerd, pod: str) -> Path:
    """Return the network namespace that containerd made for a pod; a path that is nowhere if it never came to that."""
    for config in containerd.base.glob(f"state/io.containerd.runtime.v2.task/*/{pod}/config.json"):
        for namespace in json.loads(config.read_text())["linux"]["namespaces"]:
            if namespace["type"] == "network":
                return Path(namespace["path"])
    return Path("/nonexistent")


def of_all_pods(containerd: Containerd, kept: Sequence[str] = ()) -> list[str]:
    """Return what there is of any pod of this containerd but those that are `kept`: directories and sockets of shims,
    shims and their microVMs, mounts, network interfaces."""
    sandboxes = [path for path in containerd.runtime.glob("s/*") if not any(_mentions(path, pod) for pod in kept)]
    sockets = list(containerd.runtime.glob("shim/*"))
    found = [f"directory {path}" for path in sandboxes]
    found += [f"socket {path}" for path in sockets] if len(sockets) > len(kept) else []
    shown = subprocess.run(
        ["ip", "-brief", "link", "show", "master", containerd.bridge], capture_output=True, text=True, check=False
    )
    links = shown.stdout.splitlines()
    found += [f"interface {line}" for line in links] if len(links) > len(kept) else []
    base = str(containerd.base).encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            named = b"containerd-shim" in command or b"qemu" in command
            if named and base in command + (process / "environ").read_bytes():
                found.append(f"process {process.name}: {command[:200]!r}")
    processes = [line for line in found if line.startswith("process")]
    if len(processes) <= 2 * len(kept):
        found = [line for line in found if not line.startswith("process")]
    found += [
        f"mount {line.split()[1]}"
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if f"{containerd.base}/state/io.containerd.runtime" in line and not any(pod in line for pod in kept)
    ]
    return found


def proportional_kib(pid: int) -> int:
    """Return a process's proportional set size."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def _mentions(directory: Path, pod: str) -> bool:
    try:
        return pod in (directory / "state.json").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
