"""The content-addressed store: uploads in chunks, quotas, use, and what goes when it is old or space is short.

Knowing a digest is not having its content. A tenant sees a resource only after it uploaded every byte of it itself,
whatever others have stored; the bytes are kept once all the same. All methods run in the reactor's thread; what blocks
is in `files`, done by the disk threads under the digest as key, so that operations on one file keep their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from remora.agent import files
from remora.agent.disk import DiskPool
from remora.agent.holdings import Holdings
from remora.agent.journal import Journal
from remora.agent.policy import Limits, StoreLimits
from remora.agent.quotas import Quotas
from remora.agent.upload import PutDone, Upload, check_quota
from remora.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
)

#: An upload whose last chunk is older than this is not waited for: it goes on whenever its client comes back.
_UNDER_WAY_S = 1.0


def _no_such(digest: str) -> RemoraError:
    return NotFoundError(f"there is no resource {digest}", fix="upload it first")


class Store:
    """Resources of all tenants. `bytes_stored` is what they take on the disk, each counted once."""

    def __init__(
        self,
        resource_files: files.ResourceFiles,
        journal: Journal,
        disk: DiskPool,
        limits: StoreLimits,
        counts: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = resource_files
        self._journal = journal
        self._disk = disk
        self._limits = limits
        self._counts = counts
        self._clock = clock
        self.quotas: Quotas | None = None
        self._holdings = Holdings(resource_files, journal, disk, self._is_uploaded)
        self._ledger, self._verified = self._holdings.ledger, self._holdings.verified
        self._uploads: dict[tuple[str, str], Upload] = {}
        self._replaced = False
        self._holdings.recover()
        self._partial_bytes = sum(size for _path, size, _at in self._files.partials())
        self._expire_partials()

    def uploading(self) -> int:
        """Return how many uploads are under way: begun, not complete, and a chunk came a moment ago."""
        since_s = time.monotonic() - _UNDER_WAY_S
        return sum(upload.active_s > since_s for upload in self._uploads.values())

    @property
    def bytes_stored(self) -> int:
        return self._ledger.total_bytes + self._partial_bytes

    def _is_uploaded(self, digest: str) -> bool:
        return any(name == digest for _tenant, name in self._uploads)

    # -- questions --------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, str, int, float, int]]:
        """Yield (tenant, digest, bytes, last used, sessions that hold it): for the operator."""
        return self._ledger.entries()

    def owns(self, tenant: str, digest: str) -> bool:
        return self._ledger.owns(tenant, digest)

    def size(self, tenant: str, digest: str) -> int:
        if not self.owns(tenant, digest):
            raise _no_such(digest)
        return self._ledger.size(digest)

    def stat(self, tenant: str, digest: str) -> tuple[bool, int]:
        """Return (complete, bytes received). Says the same for what others have and for what nobody has."""
        upload = self._uploads.get((tenant, digest))
        if upload is not None:
            return False, upload.progress.received_bytes
        if self.owns(tenant, digest):
            return True, self._ledger.size(digest)
        path = self._files.partial_path(tenant, digest)
        try:
            return False, path.stat().st_size
        except FileNotFoundError:
            return False, 0

    def stat_settled(self, tenant: str, digest: str, done: Callable[[tuple[bool, int]], None]) -> None:
        """As `stat`, but wait for an upload whose last chunk is on its way to the disk."""
        upload = self._uploads.get((tenant, digest))
        if upload is not None and upload.submitted_bytes == upload.total_bytes:
            upload.waiters.append(lambda _outcome: done(self.stat(tenant, digest)))
        else:
            done(self.stat(tenant, digest))

    # -- uploads ----------------------------------------------------------------------------------------------------

    def put(
        self, tenant: str, digest: str, offset: int, total_bytes: int, data: memoryview | bytes, done: PutDone
    ) -> None:
        """Store one chunk. `done` is called once it is written; for the last one, once the whole is safe on disk.

        `data` must stay unchanged until then.

        Raises:
            InvalidArgumentError: the chunk does not fit what was announced.
            FailedPreconditionError: bytes before it are missing.
            ResourceExhaustedError: a quota (named) or the disk is full.
        """
        if self.owns(tenant, digest) and (tenant, digest) not in self._uploads:
            done((self._ledger.size(digest), True))
            return
        upload = self._uploads.get((tenant, digest)) or self._begin(tenant, digest, total_bytes)
        if upload.submitted_bytes == upload.total_bytes == total_bytes:  # another connection sent the last chunk
            upload.waiters.append(done)
            return
        upload.check_chunk(offset, total_bytes, len(data))
        if offset < upload.submitted_bytes:  # sent again: what was received already is skipped
            data = memoryview(data)[upload.submitted_bytes - offset :]
            offset = upload.submitted_bytes
            if not len(data):  # answer once what came before is on the disk
                self._disk.submit(digest, lambda: None, lambda _: done(self._progress(tenant, digest)))
                return
        self._make_room(len(data))
        upload.active_s = time.monotonic()
        last = offset + len(data) == total_bytes

        def write() -> files.Replaced | None:
            if upload.progress.received_bytes != offset:
                raise FailedPreconditionError(
                    f"the chunk before offset {offset} was not stored", fix="ask StatResource"
                )
            self._files.append(upload.path, upload.progress, data)
            return self._files.finish(upload.path, upload.progress, digest) if last else None

        def written(outcome: files.Replaced | RemoraError | None) -> None:
            self._written(tenant, digest, upload, len(data), outcome, done)

        self._disk.submit(digest, write, written)
        upload.submitted_bytes += len(data)

    def add(self, tenant: str, data: memoryview | bytes, done: Callable[[str | RemoraError], None]) -> None:
        """Store a resource that came in one piece; `done` gets its digest."""
        size = len(data)

        def hashed(digest: str | RemoraError) -> None:
            if isinstance(digest, RemoraError):
                done(digest)
                return
            complete, received = self.stat(tenant, digest)
            if complete:
                done(digest)
                return
            upload = self._uploads.get((tenant, digest))
            start = upload.submitted_bytes if upload is not None else received

            def stored(outcome: tuple[int, bool] | RemoraError) -> None:
                done(outcome if isinstance(outcome, RemoraError) else digest)

            try:
                self.put(tenant, digest, start, size, memoryview(data)[start:], stored)
            except RemoraError as error:
                done(error)

        self._disk.submit(tenant, lambda: files.digest_of(data), hashed)

    def _begin(self, tenant: str, digest: str, total_bytes: int) -> Upload:
        if total_bytes < 1:
            raise InvalidArgumentError("a resource cannot be empty", fix="give its size as total_bytes")
        number = self._ledger.count(tenant) + sum(1 for owner, _ in self._uploads if owner == tenant)
        # Bytes belong to a tenant: of rules by label, those of a sandbox that is a tenant of its own apply.
        terms = self.quotas.terms(tenant, tenant) if self.quotas is not None else None
        check_quota(number, self._ledger.tenant_bytes[tenant], total_bytes, self._counts, self._limits, terms)
        path = self._files.partial_path(tenant, digest)
        try:
            received = path.stat().st_size
        except FileNotFoundError:
            received = 0
        if received >= total_bytes:  # left by a crash between the last chunk and the final name
            self._partial_bytes -= received
            path.unlink(missing_ok=True)
            received = 0
        upload = Upload(path, received, total_bytes)
        self._uploads[tenant, digest] = upload
        self._ledger.charge(tenant, total_bytes)
        return upload

    def _progress(self, tenant: str, digest: str) -> tuple[int, bool]:
        complete, received = self.stat(tenant, digest)
        return received, complete

    def _written(
        self,
        tenant: str,
        digest: str,
        upload: Upload,
        length: int,
        outcome: files.Replaced | RemoraError | None,
        done: PutDone,
    ) -> None:
        """A chunk is on the disk, or not; with the last one, the whole under its name."""
        if isinstance(outcome, tuple):
            self._replaced = True
            self._verified.replaced(digest, self._ledger.owners(digest), *outcome)
        if upload.dropped:  # the tenant is gone
            self._disk.insist(digest, partial(self._files.discard, upload.path))
            self._holdings.remove_unowned(digest)
            done(_no_such(digest))
        elif isinstance(outcome, tuple):
            self._acknowledge(tenant, digest, upload, outcome[1], done)
        elif outcome is None:
            self._partial_bytes += length
            upload.counted_bytes += length
            done((upload.progress.received_bytes, False))
        elif self._uploads.get((tenant, digest)) is upload:
            self._failed(tenant, digest, upload, outcome, done)
        else:  # a chunk before this one has failed it
            done(outcome)

    def _acknowledge(self, tenant: str, digest: str, upload: Upload, stamp: files.Stamp, done: PutDone) -> None:
        """The file is safe; say so only when its owner is, too."""
        size, now = upload.total_bytes, self._clock()
        self._partial_bytes -= upload.counted_bytes  # it is counted as a resource from now on

        def committed(error: RemoraError | None) -> None:
            if self._uploads.pop((tenant, digest), None) is not None:
                self._ledger.charge(tenant, -size)
            if error is None and not upload.dropped:
                self._ledger.own(tenant, digest, size, now)
                self._verified.note(tenant, digest, stamp)
                upload.end((size, True), done)
                return
            if digest in self._ledger:  # others own it
                self._holdings.forget_row(tenant, digest)
            else:
                self._holdings.forget_rows(digest)
            self._holdings.remove_unowned(digest)
            upload.end(error or _no_such(digest), done)

        self._journal.write(
            ("INSERT OR REPLACE INTO resources VALUES (?,?)", (digest, size)),
            ("INSERT OR REPLACE INTO owners VALUES (?,?,?)", (tenant, digest, now)),
            durable=True,
            done=committed,
        )

    def _failed(self, tenant: str, digest: str, upload: Upload, error: RemoraError, done: PutDone) -> None:
        """Forget the upload in memory; the bytes that are on the disk and right stay for a resume."""
        self._uploads.pop((tenant, digest), None)
        self._ledger.charge(tenant, -upload.total_bytes)
        if isinstance(error, DataLossError):  # the partial file is gone
            self._partial_bytes -= upload.counted_bytes
        if isinstance(error, ResourceExhaustedError):
            self._holdings.evict(upload.total_bytes)
        self._holdings.remove_unowned(digest)
        upload.end(error, done)

    # -- use --------------------------------------------------------------------------------------------------------

    def open(self, tenant: str, digest: str, done: Callable[[Path | RemoraError], None]) -> None:
        """Hand out the file of a tenant's resource, after checking its bytes since it last changed.

        A damaged file is removed and forgotten, so that the tenant can upload it again.
        """
        if not self.owns(tenant, digest):
            done(_no_such(digest))
            return
        path = self._files.path(digest)

        def check() -> files.Stamp:
            stamp = files.stamp(path)
            if stamp is None:
                raise DataLossError(f"the file of {digest} is gone", fix="upload the resource again")
            if (tenant, digest, stamp) not in self._verified:
                self._files.verify(path, digest)
            return stamp

        def checked(outcome: files.Stamp | RemoraError) -> None:
            if isinstance(outcome, DataLossError):
                self._holdings.forget(digest)
            if isinstance(outcome, RemoraError):
                done(outcome)
                return
            if self.owns(tenant, digest):
                self._verified.note(tenant, digest, outcome)
            done(path)

        self._disk.submit(digest, check, checked)

    def hold(self, tenant: str, digest: str) -> None:
        """Keep a resource while a session uses it."""
        self._ledger.hold(tenant, digest)

    def unhold(self, tenant: str, digest: str) -> None:
        now = self._clock()
        if self._ledger.unhold(tenant, digest, now) and self.owns(tenant, digest):
            self._journal.write(("UPDATE owners SET used_at=? WHERE tenant=? AND digest=?", (now, tenant, digest)))

    def grant(self, tenant: str, digests: Iterable[str]) -> None:
        """Make a clone's tenant an owner of what its template uploaded."""
        now = self._clock()
        for digest in digests:
            if digest in self._ledger and not self.owns(tenant, digest):
                self._holdings.grant(tenant, digest, now)

    # -- getting rid of things --------------------------------------------------------------------------------------

    def release(self, tenant: str, digest: str) -> None:
        """The tenant gives a resource up; the bytes go when nobody else has them."""
        if not self._ledger.holds(tenant, digest):
            self._holdings.disown(tenant, digest)

    def drop_tenant(self, tenant: str) -> None:
        """Forget a tenant that will not come back, with its unfinished uploads."""
        for key in [key for key in self._uploads if key[0] == tenant]:
            upload = self._uploads.pop(key)
            upload.dropped = True
            self._ledger.charge(tenant, -upload.total_bytes)
        for path, size in self._files.partials_of(tenant):
            self._partial_bytes -= size
            self._disk.insist(f"sha256:{path.name}", partial(self._files.discard, path))
        for digest in self._ledger.of_tenant(tenant):
            self._holdings.disown(tenant, digest)

    def tidy(self) -> None:
        """Free what uploads have replaced; called every second or so, so that no upload is measured by it."""
        if self._replaced:
            self._replaced = False
            self._disk.insist("replaced", self._files.clear_replaced)

    def sweep(self) -> None:
        """Remove what nobody used for long; called now and then."""
        for tenant, digest in self._ledger.unused_since(self._clock() - self._limits.max_age_s):
            self._holdings.disown(tenant, digest)
        self._expire_partials()

    def _expire_partials(self) -> None:
        oldest = self._clock() - self._limits.partial_age_s
        uploads = {upload.path: key for key, upload in self._uploads.items()}
        for path, size, written_at in self._files.partials():
            if written_at >= oldest:
                continue
            key = uploads.get(path)
            if key is not None:
                upload = self._uploads[key]
                if upload.submitted_bytes != upload.progress.received_bytes:
                    continue  # a chunk is on its way to the disk
                del self._uploads[key]
                self._ledger.charge(key[0], -upload.total_bytes)
            self._files.discard(path)
            self._partial_bytes -= size

    def _make_room(self, size: int) -> None:
        missing = self.bytes_stored + size - self._limits.total_bytes
        if missing > 0 and self._holdings.evict(missing) < missing:
            raise ResourceExhaustedError(
                "the store is full, and sessions use all that is in it (store.total_bytes)",
                fix="try again later, or ask the operator to raise it",
            )
