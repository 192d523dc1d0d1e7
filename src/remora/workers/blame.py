"""Who ends a worker that others share, and for how long nothing of theirs runs there.

A request whose worker died though it was alone there the second time, or had to be killed because the request could not
be stopped: there is no one else to blame. It costs everybody a worker's start, so nobody may do it again and again.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from remora.errors import RemoraError, ResourceExhaustedError

#: So many in so many seconds are forgiven: a model may have a fault that its callers know nothing of.
FORGIVEN = 3
MEMORY_S = 600.0
_MOST_TENANTS = 4096


class Blame:
    """Time comes in as an argument."""

    def __init__(self) -> None:
        self._ends: OrderedDict[str, deque[float]] = OrderedDict()

    def note(self, tenant: str, now_s: float) -> None:
        """A request of the tenant's has ended its worker."""
        ends = self._ends.setdefault(tenant, deque(maxlen=FORGIVEN))
        ends.append(now_s)
        self._ends.move_to_end(tenant)
        if len(self._ends) > _MOST_TENANTS:
            self._ends.popitem(last=False)

    def refusal(self, tenant: str, now_s: float) -> RemoraError | None:
        """Return why a request of the tenant's is not taken; None unless too many have ended workers lately."""
        ends = self._ends.get(tenant)
        if ends is None or len(ends) < FORGIVEN or now_s > ends[0] + MEMORY_S:
            return None
        left_s = ends[0] + MEMORY_S - now_s
        return ResourceExhaustedError(
            f"{FORGIVEN} requests of this tenant have ended workers that others use",
            fix=f"see which inputs did, and come back in {left_s:.0f} s; uploaded models are served meanwhile",
        )
