"""What `GetProfiler` shows: how long the stages of a session's latest Genop calls took.

vAccel keeps every sample for ever and only when profiling is on. Here the latest are kept, for sessions that use Genop:
64 of each stage in two flat arrays, which is little enough to be always on.
"""

from __future__ import annotations

import time
from array import array

from remora.wire import vaccel

COMPONENT = "vaccel-rpc-agent"
_KEPT = 64


class _Region:
    __slots__ = ("count", "spans", "starts")

    def __init__(self) -> None:
        self.starts = array("Q")
        self.spans = array("Q")
        self.count = 0

    def add(self, start_ns: int, span_ns: int) -> None:
        if self.count < _KEPT:
            self.starts.append(start_ns)
            self.spans.append(span_ns)
        else:
            place = self.count % _KEPT
            self.starts[place], self.spans[place] = start_ns, span_ns
        self.count += 1

    def message(self) -> vaccel.ProfilingRegion:
        pairs = sorted(zip(self.starts, self.spans, strict=True))
        return vaccel.ProfilingRegion(samples=[vaccel.ProfilingSample(start=at, time=span) for at, span in pairs])


class Stopwatch:
    """Times the stages of one call, one after the other."""

    __slots__ = ("_last_ns", "_regions")

    def __init__(self, regions: dict[str, _Region]) -> None:
        self._regions = regions
        self._last_ns = 0

    def mark(self, now_ns: int) -> None:
        """The first stage begins."""
        self._last_ns = now_ns

    def lap(self, name: str) -> None:
        """A stage ends, and the next begins."""
        now_ns = time.monotonic_ns()
        region = self._regions.get(name)
        if region is None:
            region = self._regions[name] = _Region()
        region.add(self._last_ns, now_ns - self._last_ns)
        self._last_ns = now_ns


class Profiles:
    """The regions of every session that has any."""

    def __init__(self) -> None:
        self._sessions: dict[str, dict[str, _Region]] = {}

    def watch(self, session_id: str) -> Stopwatch:
        return Stopwatch(self._sessions.setdefault(session_id, {}))

    def forget(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    def profiler(self, session_id: str) -> vaccel.Profiler:
        regions = self._sessions.get(session_id, {})
        shown = {name: region.message() for name, region in regions.items()}
        return vaccel.Profiler(component_name=COMPONENT, regions=shown)
