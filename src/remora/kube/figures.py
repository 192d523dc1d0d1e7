"""Figures of pods over a window, from what the node agents count. Pure.

Agents export counters; an autoscaler wants rates. Samples of each agent's `remora_pod_*` families are kept for a
window, and the figures are what happened within it. A counter that went down began anew: the agent was restarted, or
the pod's name went to another sandbox.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from remora.agent.pod_counts import POD_FAMILIES

#: Namespace and name.
Pod = tuple[str, str]
#: In flight, operations, seconds in queues, seconds on devices: in the order of `POD_FAMILIES`.
Counts = tuple[float, float, float, float]
#: What a figure is called, and what it says.
METRICS: Mapping[str, str] = {
    "remora_inflight_requests": "operations that wait or run, on average",
    "remora_requests_per_second": "operations answered per second",
    "remora_device_seconds_per_second": "seconds of devices' time used per second",
    "remora_queue_seconds": "seconds that an operation waited for its turn, on average",
}
_LINE = re.compile(r'(remora_pod_[a-z_]+)\{namespace="([a-z0-9-]{1,63})",pod="([a-z0-9.-]{1,253})"\} ([0-9.e+-]{1,32})')
#: A node's agent knows about a thousand pods.
_MOST_PODS = 4096
_NONE: Counts = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one pod did in `window_s`, ending at `at_s`."""

    at_s: float
    window_s: float
    values: Mapping[str, float]


def parse(text: str) -> dict[Pod, Counts]:
    """Return what an agent's metrics say of its pods; lines that are not about pods are passed over."""
    found: dict[Pod, list[float]] = {}
    for line in text.splitlines():
        if not line.startswith("remora_pod_") or (match := _LINE.fullmatch(line)) is None:
            continue
        name, namespace, pod, number = match.groups()
        if name not in POD_FAMILIES:
            continue
        try:
            value = float(number)
        except ValueError:
            continue
        if (namespace, pod) in found or len(found) < _MOST_PODS:
            found.setdefault((namespace, pod), [0.0] * 4)[POD_FAMILIES.index(name)] = value
    return {pod: (counts[0], counts[1], counts[2], counts[3]) for pod, counts in found.items()}


@dataclass(slots=True)
class _Agent:
    looked_s: float
    samples: dict[Pod, deque[tuple[float, Counts]]] = field(default_factory=dict)


class Windows:
    """The samples of all agents. Times are the caller's clock, seconds."""

    def __init__(self, window_s: float, stale_s: float) -> None:
        """
        Args:
            stale_s: An agent that was last heard of longer ago says nothing any more.
        """
        self._window_s = window_s
        self._stale_s = stale_s
        self._agents: dict[str, _Agent] = {}

    def add(self, agent: str, now_s: float, pods: Mapping[Pod, Counts]) -> None:
        """Note what an agent says now; pods that it names no more are gone."""
        known = self._agents.get(agent)
        before_s = known.looked_s if known is not None and now_s - known.looked_s <= self._stale_s else None
        entry = _Agent(now_s)
        for pod, counts in pods.items():
            samples = known.samples.get(pod) if known is not None and before_s is not None else None
            if samples is None:
                # It was not there at the last look: it has done all of this since.
                samples = deque([(before_s, _NONE)] if before_s is not None else [])
            samples.append((now_s, counts))
            while len(samples) > 2 and samples[1][0] <= now_s - self._window_s:
                samples.popleft()
            entry.samples[pod] = samples
        self._agents[agent] = entry

    def keep(self, agents: set[str]) -> None:
        """Forget all other agents."""
        for agent in self._agents.keys() - agents:
            del self._agents[agent]

    def figures(self, pod: Pod, now_s: float) -> Figures | None:
        """Return a pod's figures; None if no agent knows it, or only since its last look. A pod that two agents name
        for a moment is where it was seen last."""
        seen = [
            agent.samples[pod]
            for agent in self._agents.values()
            if pod in agent.samples and now_s - agent.looked_s <= self._stale_s
        ]
        if not seen:
            return None
        return _of(max(seen, key=lambda samples: samples[-1][0]))


def _of(samples: deque[tuple[float, Counts]]) -> Figures | None:
    (first_s, _), (last_s, _) = samples[0], samples[-1]
    if last_s <= first_s:
        return None
    operations, queue_s, device_s = (_grown(samples, place) for place in (1, 2, 3))
    # The mean of the values at the looks: a single look at a queue says little.
    in_flight = sum(counts[0] for at_s, counts in samples if at_s > first_s) / (len(samples) - 1)
    window_s = last_s - first_s
    return Figures(
        last_s,
        window_s,
        {
            "remora_inflight_requests": in_flight,
            "remora_requests_per_second": operations / window_s,
            "remora_device_seconds_per_second": device_s / window_s,
            "remora_queue_seconds": queue_s / operations if operations else 0.0,
        },
    )


def _grown(samples: deque[tuple[float, Counts]], place: int) -> float:
    grown = 0.0
    for (_, before), (_, after) in pairwise(samples):
        grown += after[place] - before[place] if after[place] >= before[place] else after[place]
    return grown
