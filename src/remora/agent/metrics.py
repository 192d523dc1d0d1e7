"""What the agent counts.

Counting happens on the path of every request, so it is plain integers found by one look-up; how Prometheus reads them
is `exposition`'s part, and costs only whoever asks.

Names come from tenants, who come and go without end. What is kept is bounded: the most recent tenants have counters of
their own, whoever comes while they are all present is counted as "other". A tenant that left is forgotten when its
place is needed; to Prometheus its series just end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from remora.agent.pod_counts import PodTable
from remora.agent.timings import STAGES, Timings

#: Upper bounds of the time histograms, seconds.
BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BUCKETS_US = tuple(bound * 1e6 for bound in BUCKETS_S)
#: Tenants with series of their own.
MAX_TENANTS = 100
#: Models with histograms of their own, and pairs of operation and model that all tenants together may have.
MAX_MODELS = 64
MAX_USES = 500
#: Kinds of answers, and rules, of one tenant.
_MAX_KINDS = 200
OTHER = "other"
#: All models that tenants uploaded, where models of all tenants are told apart.
UPLOADED = "uploaded"
_DIGEST_SHOWN = len("sha256:") + 12


class Histogram:
    """Times in buckets; `counts[i]` is how many were at most `BUCKETS_S[i]` and more than the one before."""

    __slots__ = ("counts", "sum_us")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_us = 0

    def add(self, value_us: int) -> None:
        self.counts[bisect_left(_BUCKETS_US, value_us)] += 1
        self.sum_us += value_us


class ModelUse:
    """What one tenant has done with one model: how often, and the microseconds spent in each of `STAGES`."""

    __slots__ = ("count", "histograms", "stage_us")

    def __init__(self, histograms: tuple[Histogram, ...]) -> None:
        self.count = 0
        self.stage_us = [0] * len(STAGES)
        #: Those of the operation and model for all tenants, found here to save a look-up.
        self.histograms = histograms


class TenantCounts:
    """The counters of one tenant."""

    __slots__ = ("device_us", "duration", "received_bytes", "refusals", "requests", "sent_bytes", "uses")

    def __init__(self) -> None:
        #: (door, method, code name) -> requests answered.
        self.requests: Counter[tuple[str, str, str]] = Counter()
        #: Rule, or code name -> requests refused or failed.
        self.refusals: Counter[str] = Counter()
        self.received_bytes = 0
        self.sent_bytes = 0
        #: Device -> microseconds that its operations ran.
        self.device_us: Counter[str] = Counter()
        #: From the arrival of an operation to its worker's answer.
        self.duration = Histogram()
        #: By operation and model.
        self.uses: dict[tuple[str, str], ModelUse] = {}


def _count(counter: Counter[tuple[str, str, str]], key: tuple[str, str, str]) -> None:
    if key not in counter and len(counter) >= _MAX_KINDS:
        key = (key[0], OTHER, key[2])
    counter[key] += 1


class Metrics:
    """Counters of the agent, in the loop's thread."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantCounts] = {}
        self.pods = PodTable()
        #: By operation and model: a histogram for each of `STAGES`.
        self.stages: dict[tuple[str, str], tuple[Histogram, ...]] = {}
        self._others = TenantCounts()
        self._gone: dict[str, None] = {}
        self._uses = 0

    # -- counting ---------------------------------------------------------------------------------------------------

    def answered(self, door: str, method: str, tenant: str, code: str) -> None:
        counts = self.tenants.get(tenant) or self._admit(tenant)
        key = (door, method, code)
        if key in counts.requests:
            counts.requests[key] += 1
        else:
            _count(counts.requests, key)

    def refused(self, tenant: str, rule: str) -> None:
        counts = self.tenants.get(tenant) or self._admit(tenant)
        if rule not in counts.refusals and len(counts.refusals) >= _MAX_KINDS:
            rule = OTHER
        counts.refusals[rule] += 1

    def received(self, tenant: str, size_bytes: int) -> None:
        (self.tenants.get(tenant) or self._admit(tenant)).received_bytes += size_bytes

    def ran(
        self, tenant: str, operation: str, model: str, timings: Timings, *, device: str = "", sent_bytes: int = 0
    ) -> None:
        """Count an operation that a worker has answered."""
        counts = self.tenants.get(tenant) or self._admit(tenant)
        use = counts.uses.get((operation, model)) or self._use(counts, operation, model)
        # As `Timings` has them, each clock reading used once: this is on the path of every operation.
        batch_us, run_us = timings.batch_us, timings.run_us
        before_us = int((timings.begun_s - timings.arrived_s) * 1e6)
        after_us = int((timings.ended_s - timings.begun_s) * 1e6)
        copy_us = after_us - run_us - timings.others_us
        use.count += 1
        spent = use.stage_us
        queue, batch, run, copy = use.histograms
        for index, histogram, value_us in (
            (0, queue, before_us - batch_us),
            (2, run, run_us),
            (3, copy, copy_us if copy_us > 0 else 0),
        ):
            spent[index] += value_us
            histogram.counts[bisect_left(_BUCKETS_US, value_us)] += 1
            histogram.sum_us += value_us
        if batch_us:
            spent[1] += batch_us
            batch.add(batch_us)
        else:
            batch.counts[0] += 1
        counts.duration.add(before_us + after_us)
        counts.sent_bytes += sent_bytes
        if device:
            counts.device_us[device] += run_us

    # -- tenants and models -----------------------------------------------------------------------------------------

    def label(self, tenant: str) -> str:
        """Return the tenant's name if it has counters of its own, else "other"."""
        return tenant if tenant in self.tenants else OTHER

    def left(self, tenant: str) -> None:
        """Note that a tenant has gone: its counters stay until their place is needed."""
        if tenant in self.tenants:
            self._gone.pop(tenant, None)
            self._gone[tenant] = None

    def all_tenants(self) -> dict[str, TenantCounts]:
        """Return the counters by label; "other" only if there are others."""
        others = self._others
        some = others.requests or others.refusals or others.uses or others.received_bytes
        return {**self.tenants, OTHER: others} if some else dict(self.tenants)

    def _admit(self, tenant: str) -> TenantCounts:
        if len(self.tenants) >= MAX_TENANTS:
            longest_gone = next(iter(self._gone), None)
            if longest_gone is None:
                return self._others
            del self._gone[longest_gone]
            self._uses -= len(self.tenants.pop(longest_gone).uses)
        counts = self.tenants[tenant] = TenantCounts()
        return counts

    def came(self, tenant: str) -> None:
        """Note that a tenant is here (again)."""
        if self._gone:
            self._gone.pop(tenant, None)

    def _use(self, counts: TenantCounts, operation: str, model: str) -> ModelUse:
        """Return a new use; beyond the bound one for all further models."""
        shown = model[:_DIGEST_SHOWN] if model.startswith("sha256:") else model
        if self._uses >= MAX_USES:
            shown = OTHER
        use = counts.uses.get((operation, shown))
        if use is None:
            use = counts.uses[operation, shown] = ModelUse(self._histograms(operation, model))
            self._uses += 1
        return use

    def _histograms(self, operation: str, model: str) -> tuple[Histogram, ...]:
        key = (operation, UPLOADED if model.startswith("sha256:") else model)
        if key not in self.stages and len(self.stages) >= MAX_MODELS:
            key = (operation, OTHER)
        found = self.stages.get(key)
        if found is None:
            found = self.stages[key] = tuple(Histogram() for _ in STAGES)
        return found
