"""The host's TSC rate, which an emulated guest must be told.

microvm has no timer against which the guest's kernel could calibrate its TSC: without `tsc_early_khz` most boots under
emulation hang for good, and a wrong value makes the guest's clock run wrong by the same factor. /proc/cpuinfo shows the
*current* frequency on bare metal, so the rate is measured: `rdtsc` against the monotonic clock, once per host boot.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from pathlib import Path

from remora.errors import FailedPreconditionError
from remora.vmm.hostcache import cached

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f3148c1e2204809d0c3")
_MEASURE_S = 0.1


def host_tsc_khz(cache_dir: Path) -> int:
    """Return the rate in kHz; measured on the first call after a host boot (0.1 s)."""
    return int(cached(cache_dir, "tsc_khz", _find))


def _find() -> int:
    try:
        return _measure()
    except OSError:
        # No executable memory for us (a hardened host): the next best source.
        return _from_cpuinfo()


def _measure() -> int:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_RDTSC)
    holder = ctypes.c_char.from_buffer(code)
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(holder))
    ticks, at_ns = _sample(rdtsc)
    time.sleep(_MEASURE_S)
    later_ticks, later_ns = _sample(rdtsc)
    del rdtsc, holder
    code.close()
    return round((later_ticks - ticks) * 1_000_000 / (later_ns - at_ns))


def _sample(rdtsc: Callable[[], int]) -> tuple[int, int]:
    """Return (ticks, monotonic ns): the tightest of several brackets, for a preemption would show as an error."""
    brackets = []
    for _ in range(20):
        before = time.monotonic_ns()
        ticks = rdtsc()
        after = time.monotonic_ns()
        brackets.append((after - before, ticks, (before + after) // 2))
    return min(brackets)[1:]


def _from_cpuinfo() -> int:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return round(float(line.partition(":")[2]) * 1000)
    raise FailedPreconditionError(
        "the TSC rate of this host is unknown: /proc/cpuinfo has no 'cpu MHz'", fix="run on an x86-64 host"
    )
