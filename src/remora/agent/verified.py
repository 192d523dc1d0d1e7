"""Which stored files were found right, and for whom: hashing a model again before each load would cost seconds.

By tenant, although tenants share files: how long an answer takes must not tell one that another has the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from remora.agent.files import Stamp


class Verified:
    """The file that was right when a tenant last used or uploaded it. Written by the reactor, read by disk threads."""

    def __init__(self) -> None:
        self._stamps: dict[tuple[str, str], Stamp] = {}

    def __contains__(self, found: tuple[str, str, Stamp]) -> bool:
        """True for (tenant, digest, stamp) if that file needs no reading again."""
        tenant, digest, stamp = found
        return self._stamps.get((tenant, digest)) == stamp

    def note(self, tenant: str, digest: str, stamp: Stamp) -> None:
        self._stamps[tenant, digest] = stamp

    def replaced(self, digest: str, owners: Iterable[str], before: Stamp | None, after: Stamp) -> None:
        """Another tenant's upload, verified as it came, took the file's place: to its owners nothing has changed."""
        for owner in owners:
            if before is not None and self._stamps.get((owner, digest)) == before:
                self._stamps[owner, digest] = after

    def forget(self, tenant: str, digest: str) -> None:
        self._stamps.pop((tenant, digest), None)
