"""Finds what is left of a pod anywhere on the host, in the kernel's own lists."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
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
