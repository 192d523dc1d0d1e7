"""Who has which resource, in memory and in the journal alike, and the end of what nobody has any more.

The last of a resource's owners takes its rows and its file along. Which uploads are under way is the store's to know:
it is asked before a file goes, because one of them may have just given it its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from remora.agent import files
from remora.agent.disk import DiskPool
from remora.agent.journal import Journal
from remora.agent.ledger import Ledger
from remora.agent.verified import Verified


class Holdings:
    """Ownership that lasts. `ledger` may be asked anything; what changes it for good goes through here."""

    def __init__(
        self, resource_files: files.ResourceFiles, journal: Journal, disk: DiskPool, uploading: Callable[[str], bool]
    ) -> None:
        """
        Args:
            uploading: Tells whether anyone uploads a digest now.
        """
        self.ledger = Ledger()
        self.verified = Verified()
        self._files = resource_files
        self._journal = journal
        self._disk = disk
        self._uploading = uploading

    def recover(self) -> None:
        """Take over what the last agent left; a file without a row was never acknowledged, a row without a file is
        worth nothing."""
        present = self._files.complete()
        rows = dict(self._journal.rows("SELECT digest, size FROM resources"))
        for tenant, digest, used_at in self._journal.rows("SELECT tenant, digest, used_at FROM owners"):
            if digest in rows and present.get(digest) == rows[digest]:
                self.ledger.own(tenant, digest, rows[digest], used_at)
        owned = self.ledger.digests()
        for digest in present.keys() - owned:
            self._files.discard(self._files.path(digest))
        for digest in rows.keys() - owned:
            self.forget_rows(digest)

    def grant(self, tenant: str, digest: str, now: float) -> None:
        """Make a tenant an owner of what another one uploaded."""
        self.ledger.own(tenant, digest, self.ledger.size(digest), now)
        self._journal.write(("INSERT OR REPLACE INTO owners VALUES (?,?,?)", (tenant, digest, now)))

    def disown(self, tenant: str, digest: str) -> None:
        """End a tenant's ownership; the bytes go when nobody else has them."""
        self.verified.forget(tenant, digest)
        self.forget_row(tenant, digest)
        if self.ledger.disown(tenant, digest):
            self.forget_rows(digest)
            self.remove_unowned(digest)

    def forget(self, digest: str) -> None:
        """Remove a resource for all its owners."""
        for tenant in self.ledger.owners(digest):
            self.disown(tenant, digest)

    def evict(self, wanted_bytes: int) -> int:
        """Remove the least recently used resources that no session holds; return the bytes they took."""
        freed = 0
        for digest in self.ledger.unheld():
            if freed >= wanted_bytes:
                break
            freed += self.ledger.size(digest)
            self.forget(digest)
        return freed

    def forget_row(self, tenant: str, digest: str) -> None:
        """Have the journal forget one ownership."""
        self._journal.write(("DELETE FROM owners WHERE tenant=? AND digest=?", (tenant, digest)))

    def forget_rows(self, digest: str) -> None:
        """Have the journal forget a resource."""
        self._journal.write(
            ("DELETE FROM owners WHERE digest=?", (digest,)), ("DELETE FROM resources WHERE digest=?", (digest,))
        )

    def remove_unowned(self, digest: str) -> None:
        """Remove a file that nobody owns, nor uploads at the moment."""
        if digest not in self.ledger and not self._uploading(digest):
            self._disk.insist(digest, partial(self._files.discard, self._files.path(digest)))
