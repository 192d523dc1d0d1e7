"""On which NUMA node each device is, for the kubelet's topology manager."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def nodes(kind: str, root: Path = Path("/")) -> dict[int, int]:
    """Return the NUMA node of each device that says one; empty where the machine has only one node.

    GPUs are numbered by their PCI address, as NVIDIA's driver lists them and CUDA does with
    CUDA_DEVICE_ORDER=PCI_BUS_ID; processors in the order of those that this process may use.
    """
    if len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return {}
    if kind == "cpu":
        return _numbered(_of_cpu(root, cpu) for cpu in sorted(os.sched_getaffinity(0)))
    addresses = sorted(path.name for path in (root / "proc/driver/nvidia/gpus").glob("*"))
    return _numbered(_of_pci(root, address) for address in addresses)


def _numbered(found: Iterable[int | None]) -> dict[int, int]:
    return {device: node for device, node in enumerate(found) if node is not None and node >= 0}


def _of_cpu(root: Path, cpu: int) -> int | None:
    for path in (root / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*"):
        return int(path.name.removeprefix("node"))
    return None


def _of_pci(root: Path, address: str) -> int | None:
    try:
        return int((root / f"sys/bus/pci/devices/{address.lower()}/numa_node").read_text())
    except (OSError, ValueError):
        return None
