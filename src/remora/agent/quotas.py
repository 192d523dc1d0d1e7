"""Rates: what a tenant may start per second, and how much device time it may use per second. Token buckets.

A bucket belongs to a tenant and the rule that gave it, so that callers of one tenant with other labels have their own.
Device time is charged when it is known, after a run; a tenant in debt is refused until its rate has paid for it. What
a pod was granted has buckets of its own, one for each kind of device, beside those of policy: the fuller debt decides.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace

from remora.agent.hints import with_retry
from remora.agent.identity import holder_of
from remora.agent.rules import Granted, Rules, Terms, kind_of
from remora.errors import ResourceExhaustedError

#: Buckets beyond which full ones are forgotten: they say the same as none.
_MOST_BUCKETS = 4096
#: Callers whose terms are remembered.
_MOST_TERMS = 16384
#: Identities without a connection whose labels are remembered.
_MOST_ABSENT = 4096


class Bucket:
    """Tokens that come at a rate, up to a bound. Time comes in as an argument."""

    __slots__ = ("most", "rate", "seen_s", "tokens")

    def __init__(self, rate: float, most: float, now_s: float) -> None:
        self.rate = rate
        self.most = self.tokens = most
        self.seen_s = now_s

    def wait_s(self, wanted: float, now_s: float) -> float:
        """Return how long until `wanted` tokens are there; 0 if they are."""
        self.tokens = min(self.most, self.tokens + max(0.0, now_s - self.seen_s) * self.rate)
        self.seen_s = now_s
        missing = wanted - self.tokens
        return missing / self.rate if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        self.tokens -= amount


class Quotas:
    """The policy in effect, and each tenant's buckets. `replace` is what a reload does."""

    def __init__(self, rules: Rules, now_s: Callable[[], float]) -> None:
        self.rules = rules
        self._now_s = now_s
        self._terms: dict[tuple[str, str], Terms] = {}
        self._labels: dict[str, Mapping[str, str]] = {}  # identity -> labels, of those that have some
        self._connections: Counter[str] = Counter()  # of those
        self._absent: OrderedDict[str, None] = OrderedDict()  # those without a connection, longest first
        self._buckets: dict[tuple[str, str, str], Bucket] = {}
        #: Returns what a holder was granted, by kind of device; `regranted` is called when that changes.
        self.granted: Callable[[str], Mapping[str, Granted]] = lambda _holder: {}

    def regranted(self) -> None:
        self._terms.clear()

    def replace(self, rules: Rules) -> None:
        """Go by other rules from now on. Buckets whose rate stays the same keep what is in them."""
        self.rules = rules
        self._terms.clear()

    def note(self, key: str, labels: Mapping[str, str]) -> None:
        """Remember the labels of an identity, as it connects."""
        if labels or key in self._labels:
            self._connections[key] += 1
            self._absent.pop(key, None)
        if self._labels.get(key, {}) != labels:
            self._labels[key] = labels
            for known in [known for known in self._terms if known[0] == key]:
                del self._terms[known]

    def left(self, key: str) -> None:
        """Note that a connection of an identity has ended. Its labels stay a while: what it asked for may still run."""
        if key not in self._labels:
            return
        self._connections[key] -= 1
        if not self._connections[key]:
            del self._connections[key]
            self._absent[key] = None
            if len(self._absent) > _MOST_ABSENT:
                self.forget(next(iter(self._absent)))

    def forget(self, key: str) -> None:
        self._labels.pop(key, None)
        self._absent.pop(key, None)
        self._connections.pop(key, None)

    def terms(self, key: str, tenant: str) -> Terms:
        """Return what applies to an identity of a tenant."""
        found = self._terms.get((key, tenant))
        if found is None:
            if len(self._terms) >= _MOST_TERMS:
                self._terms.clear()
            labels = self._labels.get(key, {})
            found = self.rules.terms(tenant, labels)
            grants = self.granted(holder_of(key, labels))
            if grants:
                found = replace(found, grants=grants)
            self._terms[key, tenant] = found
        return found

    def admit(self, tenant: str, terms: Terms) -> None:
        """Take a request's token.

        Raises:
            ResourceExhaustedError: the tenant is over a rate; says when it will not be.
        """
        rate, device = terms.values["requests_per_s"], terms.values["device_s_per_s"]
        if rate is None and device is None:
            return
        now_s = self._now_s()
        if device is not None:
            after_s = self._bucket(tenant, "device_s_per_s", terms, now_s).wait_s(1e-9, now_s)
            if after_s:
                raise terms.exhausted("device_s_per_s", "this tenant has used its device time", after_s)
        if rate is not None:
            bucket = self._bucket(tenant, "requests_per_s", terms, now_s)
            after_s = bucket.wait_s(1.0, now_s)
            if after_s:
                raise terms.exhausted("requests_per_s", "this tenant sends too many requests", after_s)
            bucket.take(1.0)

    def admit_on(self, device: str, key: str, terms: Terms) -> None:
        """
        Raises:
            ResourceExhaustedError: the pod has used what it was granted of such devices; says when it has more.
        """
        granted = terms.grants.get(kind_of(device))
        if granted is None:
            return
        now_s = self._now_s()
        after_s = self._granted_bucket(granted, key, terms, now_s).wait_s(1e-9, now_s)
        if after_s:
            what = f"this pod has used its {granted.shares} shares of remora.dev/{granted.kind} ({granted.rule})"
            raise with_retry(ResourceExhaustedError(what), after_s)

    def charge(self, tenant: str, terms: Terms, run_us: int, *, device: str = "", key: str = "") -> None:
        """Note device time that was used."""
        granted = terms.grants.get(kind_of(device)) if device else None
        if terms.values["device_s_per_s"] is None and granted is None:
            return
        now_s = self._now_s()
        buckets = []
        if terms.values["device_s_per_s"] is not None:
            buckets.append(self._bucket(tenant, "device_s_per_s", terms, now_s))
        if granted is not None:
            buckets.append(self._granted_bucket(granted, key, terms, now_s))
        for bucket in buckets:
            bucket.wait_s(0.0, now_s)
            bucket.take(run_us / 1e6)

    def _granted_bucket(self, granted: Granted, key: str, terms: Terms, now_s: float) -> Bucket:
        rate = granted.device_s_per_s
        holder = holder_of(key, self._labels.get(key, {}))
        return self._made((holder, "grant", granted.kind), rate, rate * terms.values["burst_s"], now_s)

    def _bucket(self, tenant: str, key: str, terms: Terms, now_s: float) -> Bucket:
        rate = float(terms.values[key])
        most = rate * terms.values["burst_s"]
        if key == "requests_per_s":
            most = max(1.0, most)
        return self._made((tenant, key, terms.sources.get(key, "")), rate, most, now_s)

    def _made(self, name: tuple[str, str, str], rate: float, most: float, now_s: float) -> Bucket:
        bucket = self._buckets.get(name)
        if bucket is None or (bucket.rate, bucket.most) != (rate, most):
            if len(self._buckets) >= _MOST_BUCKETS:
                self._buckets = {one: kept for one, kept in self._buckets.items() if kept.wait_s(kept.most, now_s)}
            bucket = self._buckets[name] = Bucket(rate, most, now_s)
        return bucket
