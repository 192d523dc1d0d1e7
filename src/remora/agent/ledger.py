"""Who owns which resource, who holds it, and what it all weighs: the store's arithmetic, without files or threads.

A tenant owns what it uploaded. A session of it holds what it uses, which keeps that from being removed to make room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator


class Ledger:
    """Owners, holds and sizes. Times are seconds since the epoch."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._owned: dict[str, dict[str, float]] = {}  # tenant -> digest -> last used
        self._owners: Counter[str] = Counter()  # digest -> tenants
        self._holds: Counter[tuple[str, str]] = Counter()  # (tenant, digest) -> sessions
        self._held: Counter[str] = Counter()  # digest -> sessions of all tenants
        #: Bytes of what each tenant owns, and of what it has announced.
        self.tenant_bytes: Counter[str] = Counter()
        #: Bytes of all resources, each counted once.
        self.total_bytes = 0

    def __contains__(self, digest: str) -> bool:
        """True if anyone owns the resource."""
        return digest in self._sizes

    def owns(self, tenant: str, digest: str) -> bool:
        return digest in self._owned.get(tenant, ())

    def size(self, digest: str) -> int:
        return self._sizes[digest]

    def count(self, tenant: str) -> int:
        """Return how many resources the tenant owns."""
        return len(self._owned.get(tenant, ()))

    def of_tenant(self, tenant: str) -> list[str]:
        return list(self._owned.get(tenant, ()))

    def entries(self) -> Iterator[tuple[str, str, int, float, int]]:
        """Yield (tenant, digest, bytes, last used, sessions that hold it) of every ownership."""
        for tenant, digests in self._owned.items():
            for digest, used_at in digests.items():
                yield tenant, digest, self._sizes[digest], used_at, self._holds.get((tenant, digest), 0)

    def digests(self) -> set[str]:
        return set(self._sizes)

    def own(self, tenant: str, digest: str, size: int, used_at: float) -> None:
        """Make the tenant an owner; used just now."""
        digests = self._owned.setdefault(tenant, {})
        if digest not in digests:
            self.tenant_bytes[tenant] += size
            self._owners[digest] += 1
        digests[digest] = used_at
        if digest not in self._sizes:
            self._sizes[digest] = size
            self.total_bytes += size

    def disown(self, tenant: str, digest: str) -> bool:
        """End an ownership; True if nobody owns the resource now."""
        digests = self._owned.get(tenant)
        if digests is None or digests.pop(digest, None) is None:
            return False
        if not digests:
            del self._owned[tenant]
        self.charge(tenant, -self._sizes[digest])
        self._owners[digest] -= 1
        if self._owners[digest]:
            return False
        del self._owners[digest]
        self.total_bytes -= self._sizes.pop(digest)
        return True

    def owners(self, digest: str) -> list[str]:
        return [tenant for tenant, digests in self._owned.items() if digest in digests]

    def charge(self, tenant: str, size: int) -> None:
        """Count bytes that a tenant has announced, or that are announced no more."""
        self.tenant_bytes[tenant] += size
        if not self.tenant_bytes[tenant]:
            del self.tenant_bytes[tenant]

    def hold(self, tenant: str, digest: str) -> None:
        self._holds[tenant, digest] += 1
        self._held[digest] += 1

    def unhold(self, tenant: str, digest: str, now: float) -> bool:
        """End one hold; True if the tenant holds the resource no more, which is its last use then."""
        self._held[digest] -= 1
        self._holds[tenant, digest] -= 1
        if not self._held[digest]:
            del self._held[digest]
        if self._holds[tenant, digest]:
            return False
        del self._holds[tenant, digest]
        if self.owns(tenant, digest):
            self._owned[tenant][digest] = now
        return True

    def holds(self, tenant: str, digest: str) -> bool:
        return (tenant, digest) in self._holds

    def unused_since(self, oldest: float) -> list[tuple[str, str]]:
        """Return (tenant, digest) of what was last used before `oldest` and is not held."""
        return [
            (tenant, digest)
            for tenant, digests in self._owned.items()
            for digest, used_at in digests.items()
            if used_at < oldest and (tenant, digest) not in self._holds
        ]

    def unheld(self) -> Iterator[str]:
        """Yield what no session of any tenant holds, the least recently used first."""
        last_used: dict[str, float] = {}
        for digests in self._owned.values():
            for digest, used_at in digests.items():
                last_used[digest] = max(used_at, last_used.get(digest, 0.0))
        yield from (name for name in sorted(last_used, key=lambda name: last_used[name]) if name not in self._held)
