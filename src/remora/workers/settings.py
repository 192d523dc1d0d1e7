"""What an operator may set about workers, checked once, with defaults for a small node."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from remora.errors import InvalidArgumentError

CONFINEMENTS = ("bubblewrap", "none")
_MIB = 1 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def machine_memory_bytes() -> int:
    """Return the memory of this machine, or of the control group (a container) that this process is confined to."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")]
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max", or the other version of control groups
            found.append(int(Path(path).read_text()))
    return min(found)


@dataclass(frozen=True)
class WorkerSettings:
    #: `bubblewrap`, or `none` for machines where that cannot work and the operator accepts it.
    confinement: str = "bubblewrap"
    #: System-call filter inside the worker; off with CUDA devices, whose driver needs ioctl and more.
    seccomp: bool = True
    #: `auto`: the first GPU that ONNX Runtime can use, else the CPU; `cpu`; `cuda:N`.
    device: str = "auto"
    #: Jobs that one worker runs at the same time.
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    #: Started workers that belong to nobody yet: a tenant's first upload then does not wait for imports (0.4 s).
    standby: int = 1
    #: Shared memory of one tenant for messages in flight, and the largest part that one job's outputs may have.
    arena_bytes: int = 256 * _MIB
    output_bytes: int = 64 * _MIB
    #: Address space of a tenant's worker (RLIMIT_AS); 0: no limit. Its own code takes about 1.3 GiB of it.
    tenant_memory_bytes: int = 4096 * _MIB
    shared_memory_bytes: int = 0
    #: What loaded models may take of each device, as measured; 0: half of the machine's memory on the CPU, no bound on
    #: a GPU, whose size only its driver knows.
    device_memory_bytes: int = 0
    open_files: int = 256
    #: Threads of a worker, with bubblewrap's own process; new processes are refused anyway.
    processes: int = 64
    #: Processor time of a tenant's worker per second, where there are control groups.
    tenant_cpus: float = field(default_factory=lambda: float(len(os.sched_getaffinity(0))))
    #: Control groups and a user of its own for each worker, where this machine and the agent's rights allow them.
    cgroups: bool = True
    own_users: bool = True
    #: Libraries that one tenant may have loaded at once, each in a worker of its own.
    libraries: int = 4
    model_bytes: int = 1024 * _MIB
    image_pixels: int = 64_000_000
    #: How long a model is measured once it is loaded, to choose how it is run; 0: not at all.
    calibrate_ms: int = 1000
    #: How long a job that was told to stop may go on before its worker is killed.
    stop_grace_s: float = 0.5
    #: How long a worker may take to start.
    start_s: float = 30.0
    backoff_first_s: float = 0.1
    backoff_most_s: float = 5.0

    @property
    def shared_bound_bytes(self) -> int:
        """What the kernel keeps the worker of the catalogue's models to, where there are control groups.

        A guest's picture or an open dimension may make a model take more than the machine has: then its worker ends,
        and not what the kernel would choose.
        """
        return self.shared_memory_bytes or machine_memory_bytes() // 4 * 3

    def budget_bytes(self, device: str) -> int:
        """Return what models may take on a device; 0: no bound."""
        return self.device_memory_bytes or (machine_memory_bytes() // 2 if device == "cpu" else 0)

    def __post_init__(self) -> None:
        if self.confinement not in CONFINEMENTS:
            raise InvalidArgumentError(
                f"worker confinement is {self.confinement!r}", fix=f"allowed are {', '.join(CONFINEMENTS)}"
            )
        positive = (
            "threads",
            "arena_bytes",
            "output_bytes",
            "open_files",
            "processes",
            "model_bytes",
            "image_pixels",
            "libraries",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"worker setting {name} is {getattr(self, name)}", fix="use 1 or more")
        for name in ("standby", "device_memory_bytes", "calibrate_ms", "tenant_memory_bytes", "shared_memory_bytes"):
            if getattr(self, name) < 0:
                raise InvalidArgumentError(f"worker setting {name} is {getattr(self, name)}", fix="use 0 or more")
        if self.output_bytes > self.arena_bytes:
            raise InvalidArgumentError(
                "worker setting output_bytes is larger than arena_bytes", fix="raise arena_bytes"
            )
