"""What one case may use: seconds of CPU, and memory. A case beyond either is a fault like any exception."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

#: CPU time of one case of a few KiB. The slowest takes milliseconds; quadratic time shows long before this.
CASE_CPU_S = 2.0
#: What a process may grow by while it runs any number of cases.
MEMORY_BYTES = 512 << 20


class HangError(Exception):
    """A case used more CPU time than it may."""


def _hang(_signum: int, _frame: FrameType | None) -> None:
    raise HangError(f"the case has not ended after {CASE_CPU_S:g} s of CPU time")


class Bounds:
    """Bounds for this process while it is entered; `run` bounds one case."""

    def __enter__(self) -> Bounds:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self._limit = resource.getrlimit(resource.RLIMIT_AS)
        # Address space: an allocation that is refused is a MemoryError, which no target allows.
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, self._limit[1]))
        self._handler = signal.signal(signal.SIGVTALRM, _hang)
        return self

    def run(self, case: Callable[[bytes], None], data: bytes) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, CASE_CPU_S)
        try:
            case(data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGVTALRM, self._handler)
        resource.setrlimit(resource.RLIMIT_AS, self._limit)
