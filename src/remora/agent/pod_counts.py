"""What each pod did, under the names that Kubernetes has for it: figures for whoever scales them.

The counters of tenants cannot serve for that: several pods may be one tenant, and a tenant's name is not a pod's. A pod
is any caller whose labels say `namespace` and `pod`, which no caller can set; how many there are is bounded by what the
node attaches, and by `MAX_PODS` for those that come by a Unix socket and are never detached.
"""

from __future__ import annotations

from collections.abc import Mapping

from remora.agent.identity import Identity, holder_of
from remora.agent.timings import Timings

MAX_PODS = 1024
#: What the metrics call the figures of `PodTable.sums`, in its order.
POD_FAMILIES = (
    "remora_pod_in_flight_requests",
    "remora_pod_operations_total",
    "remora_pod_queue_seconds_total",
    "remora_pod_device_seconds_total",
)


class PodCounts:
    """The counters of one pod."""

    __slots__ = ("device_us", "holder", "name", "namespace", "operations", "queue_us")

    def __init__(self, namespace: str, name: str, holder: str) -> None:
        #: Whose grants it has.
        self.holder = holder
        self.namespace = namespace
        self.name = name
        self.operations = 0
        self.queue_us = 0
        self.device_us = 0


class PodTable:
    """The pods that are known, by identity."""

    def __init__(self) -> None:
        self._by_key: dict[str, PodCounts] = {}

    def note(self, identity: Identity) -> None:
        """Count for an identity from now on, if it is a pod's: from its attachment, not from its first request."""
        key, labels = identity.key, identity.labels
        if not labels or key in self._by_key or not labels.get("namespace") or not labels.get("pod"):
            return
        if len(self._by_key) >= MAX_PODS:
            del self._by_key[next(iter(self._by_key))]
        self._by_key[key] = PodCounts(labels["namespace"], labels["pod"], holder_of(key, labels))

    def holders(self) -> dict[tuple[str, str], str]:
        """Return whose grants each pod has, by namespace and name."""
        return {(counts.namespace, counts.name): counts.holder for counts in self._by_key.values()}

    def forget(self, key: str) -> None:
        self._by_key.pop(key, None)

    def ran(self, key: str, timings: Timings) -> None:
        """Count an operation that a worker has answered."""
        counts = self._by_key.get(key)
        if counts is not None:
            counts.operations += 1
            counts.queue_us += timings.queue_us
            counts.device_us += timings.run_us

    def sums(self, in_flight: Mapping[str, int]) -> dict[tuple[str, str], tuple[int, int, float, float]]:
        """Return, by namespace and name: in flight, operations, seconds in queues, seconds on devices.

        Two sandboxes may be one pod for a moment, while one takes the other's place.

        Args:
            in_flight: Operations that wait or run, by identity.
        """
        sums: dict[tuple[str, str], tuple[int, int, float, float]] = {}
        for key, counts in self._by_key.items():
            place = (counts.namespace, counts.name)
            flying, operations, queue_s, device_s = sums.get(place, (0, 0, 0.0, 0.0))
            sums[place] = (
                flying + in_flight.get(key, 0),
                operations + counts.operations,
                queue_s + counts.queue_us / 1e6,
                device_s + counts.device_us / 1e6,
            )
        return sums
