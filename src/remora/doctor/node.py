"""The node: its agent, what confines workers, accelerators, models, and room on disk."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from remora import paths
from remora.agent import status
from remora.agent.fleets.finder import Finder
from remora.agent.fleets.layouts import Kata
from remora.catalog import load_catalog
from remora.doctor.report import Finding
from remora.errors import RemoraError
from remora.vmm.process import find_program, first_line
from remora.wire import control_v1 as v1
from remora.workers import cgroups

AGENT, WORKERS, ACCELERATORS, STORAGE = "agent", "workers", "accelerators", "storage"
#: Where Kata and containerd keep what is running.
KATA = Path("/")
CONTAINERD = Path("/run/containerd")
#: A classification image, its guest and the models take about this much.
LITTLE_SPACE_BYTES = 4 << 30


def agent() -> Iterator[Finding]:
    """Whether an agent runs here and would serve."""
    control = paths.control_socket()
    try:
        health = status.health(control)
    except RemoraError as error:
        yield Finding(AGENT, "node agent", "note", error.message, "run: remora agent")
        return
    yield Finding(AGENT, "node agent", "ok", f"{health} at {control}")


def fleets() -> Iterator[Finding]:
    """Which microVMs of others are here, and whether the agent serves them."""
    seen = {sighting.names.sandbox for sighting in Finder([Kata(KATA)], CONTAINERD).look()}
    served: dict[str, str] = {}
    try:
        answer = status.call(paths.control_socket(), "Attachments", v1.Empty(), v1.AttachmentsResponse)
        served = {one.sandbox: one.labels["fleet"] for one in answer.attachments if one.labels.get("fleet")}
    except RemoraError:
        pass  # told by the agent's own line
    there = len(seen & served.keys())
    if not seen:
        yield Finding(AGENT, "Kata sandboxes", "note", "none that containerd knows runs on this node")
    elif there == len(seen):
        yield Finding(AGENT, "Kata sandboxes", "ok", f"{there}, all served by the agent")
    else:
        yield Finding(
            AGENT,
            "Kata sandboxes",
            "note",
            f"{len(seen)}, {there} of them served by the agent",
            "run: remora agent --attach kata (docs/kata.md)",
        )
    for fleet, count in sorted(Counter(served.values()).items()):
        if fleet != Kata.name:
            yield Finding(AGENT, f"{fleet} microVMs", "ok", f"{count} found and served by the agent")


def confinement() -> Iterator[Finding]:
    """What locks workers in: namespaces by bubblewrap, bounds by control groups."""
    binary = find_program("bwrap")
    if binary is None:
        yield Finding(WORKERS, "bubblewrap", "bad", "not installed", "apt-get install bubblewrap")
    else:
        arguments = (binary, "--unshare-all", "--ro-bind", "/", "/", "true")
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=10)
        if done.returncode:
            yield Finding(
                WORKERS,
                "bubblewrap",
                "bad",
                f"cannot make namespaces: {done.stderr.strip()}",
                "allow user namespaces: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
                "kernel.apparmor_restrict_unprivileged_userns",
            )
        else:
            yield Finding(WORKERS, "bubblewrap", "ok", first_line(binary, "--version"))
    groups = cgroups.detect()
    if isinstance(groups, str):
        yield Finding(
            WORKERS,
            "control groups",
            "note",
            f"{groups}; workers are bounded by resource limits only",
            "run the agent under systemd with Delegate=yes, or as root",
        )
    else:
        names = ", ".join(groups.controllers) or "none"
        yield Finding(WORKERS, "control groups", "ok", f"version {groups.version}, controllers: {names}")


def accelerators() -> Iterator[Finding]:
    """What models can run on."""
    flags = _processor_flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    cores = len(os.sched_getaffinity(0))
    yield Finding(ACCELERATORS, "CPU", "ok", f"{cores} cores{', ' + ' '.join(fast) if fast else ''}")
    cards = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if not cards:
        yield Finding(ACCELERATORS, "NVIDIA GPU", "note", "no /dev/nvidia*: models run on the CPU")
        return
    name = first_line(shutil.which("nvidia-smi") or "nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    # Asked of a process of its own: ONNX Runtime must not be loaded here (its telemetry, its threads).
    script = "import onnxruntime; print(' '.join(onnxruntime.get_available_providers()))"
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    import sys

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    if "CUDAExecutionProvider" in done.stdout:
        yield Finding(ACCELERATORS, "NVIDIA GPU", "ok", f"{name or len(cards)}, ONNX Runtime has CUDA")
    else:
        yield Finding(
            ACCELERATORS,
            "NVIDIA GPU",
            "note",
            f"{name or len(cards)}, but the installed ONNX Runtime has no CUDA",
            "install remora[cuda]",
        )


def _processor_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def models() -> Iterator[Finding]:
    """Which of the catalogue's models are built."""
    built = sorted(load_catalog())
    if built:
        yield Finding(STORAGE, "models", "ok", ", ".join(built))
    else:
        yield Finding(STORAGE, "models", "note", "none is built", "run: remora models build --all")


def space() -> Iterator[Finding]:
    """Room where images, models and templates are kept."""
    directory = paths.state_dir()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / (1 << 30):.1f} GiB free at {directory}"
    if free < LITTLE_SPACE_BYTES:
        yield Finding(STORAGE, "disk", "note", text, "free some space, or set REMORA_STATE_DIR to a larger disk")
    else:
        yield Finding(STORAGE, "disk", "ok", text)
    for program, package, use in (
        ("mkfs.erofs", "erofs-utils", "packing directories and the guest OS"),
        ("skopeo", "skopeo", "pulling images"),
        ("mmdebstrap", "mmdebstrap", "building images"),
    ):
        if find_program(program) is None:
            yield Finding(STORAGE, program, "note", f"not installed: it is for {use}", f"apt-get install {package}")
