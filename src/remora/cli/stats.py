"""`remora stats`: CPU and memory of microVMs, as the guest and as the host sees them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from remora.errors import RemoraError

NAME = "stats"
HELP = "show CPU and memory of microVMs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("microvm", nargs="*", metavar="MICROVM", help="names or ids (default: all that run)")


def run(args: argparse.Namespace) -> int:
    from remora import paths
    from remora.cli.ps import print_table
    from remora.sandboxes.registry import Registry
    from remora.sandboxes.sandbox import Sandbox, sweep

    sweep()
    registry = Registry(paths.runtime_dir())
    names = args.microvm or [record.id for record in registry.all() if record.state == "running"]
    found = []
    for name in names:
        try:
            with Sandbox.open(name) as sandbox:
                stats = sandbox.stats()
                found.append(
                    {
                        "id": sandbox.id,
                        "name": sandbox.name,
                        "memory_bytes": stats.memory_bytes,
                        "memory_limit_bytes": stats.memory_limit_bytes,
                        "cpu_us": stats.cpu_us,
                        "processes": stats.processes,
                        "uptime_s": stats.uptime_s,
                        "guest_memory_total_bytes": stats.guest_memory_total_bytes,
                        "guest_memory_available_bytes": stats.guest_memory_available_bytes,
                        **_of_process(int(sandbox.fields.get("machine_pid", 0))),
                    }
                )
        except RemoraError:
            # One that ended between the list and the question is no error, unless it was asked for.
            if args.microvm:
                raise
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("ID", "NAME", "MEMORY", "HOST PSS", "CPU", "PROCESSES", "UPTIME")]
    for each in found:
        rows.append(
            (
                str(each["id"]),
                str(each["name"]),
                _mib(each["memory_bytes"]),
                _mib(each["host_pss_bytes"]),
                f"{float(each['cpu_us']) / 1e6:.2f}s",  # type: ignore[arg-type]
                str(each["processes"]),
                f"{float(each['uptime_s']):.0f}s",  # type: ignore[arg-type]
            )
        )
    print_table(rows)
    return 0


def _of_process(pid: int) -> dict[str, int]:
    """Return what the virtual machine's process costs the host: its proportional share of memory.

    That of a jail is the first of a PID namespace and has the monitor as its child (vmm/jail.py).
    """
    size = 0
    try:
        pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        for each in pids:
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    size += int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return {"host_pss_bytes": size}


def _mib(value: object) -> str:
    return f"{int(value) / (1 << 20):.1f}M"  # type: ignore[call-overload]
