"""The content-addressed store: who uploaded what, how much, and what may go when space is short.

Knowing a digest is not having its content. A tenant sees a resource only after it uploaded every byte of it itself,
whatever others have stored; the bytes are kept once all the same. All methods run in the reactor's thread; what blocks
is in `files`, done by the disk threads under the digest as key, so that operations on one file keep their order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from remora.agent import files
from remora.agent.disk import DiskPool
from remora.agent.journal import Journal
from remora.agent.policy import Limits, StoreLimits
from remora.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    ResourceExhaustedError,
)

#: (bytes received, complete) of an upload, or why it failed.
PutDone = Callable[[tuple[int, bool] | RemoraError], None]


class _Upload:
    __slots__ = ("counted_bytes", "path", "progress", "submitted_bytes", "total_bytes")

    def __init__(self, path: Path, received_bytes: int, total_bytes: int) -> None:
        self.path = path
        self.progress = files.Progress(received_bytes)
        #: Received, and handed to the disk thread.
        self.submitted_bytes = received_bytes
        #: Its part of the store's `bytes_stored`.
        self.counted_bytes = received_bytes
        self.total_bytes = total_bytes


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
        self._sizes: dict[str, int] = {}
        self._owned: dict[str, dict[str, float]] = {}  # tenant -> digest -> last used
        self._holds: Counter[tuple[str, str]] = Counter()  # (tenant, digest) -> sessions
        self._held: Counter[str] = Counter()  # digest -> sessions of all tenants
        self._uploads: dict[tuple[str, str], _Upload] = {}
        self._tenant_bytes: dict[str, int] = {}
        self._verified: dict[str, tuple[int, int, int]] = {}
        self.bytes_stored = 0
        self._recover()

    def _recover(self) -> None:
        """Take over what the last agent left; a file without a row was never acknowledged, a row without a file is
        worth nothing."""
        present = self._files.complete()
        rows = dict(self._journal.rows("SELECT digest, size FROM resources"))
        for tenant, digest, used_at in self._journal.rows("SELECT tenant, digest, used_at FROM owners"):
            if digest in rows and present.get(digest) == rows[digest]:
                self._own(tenant, digest, rows[digest], used_at)
        owned = {digest for digests in self._owned.values() for digest in digests}
        for digest in present.keys() - owned:
            self._files.discard(self._files.path(digest))
        for digest in rows.keys() - owned:
            self._journal.write(
                ("DELETE FROM owners WHERE digest=?", (digest,)), ("DELETE FROM resources WHERE digest=?", (digest,))
            )
        self.bytes_stored += sum(size for _path, size, _at in self._files.partials())
        self._expire_partials()

    def _own(self, tenant: str, digest: str, size: int, used_at: float) -> None:
        digests = self._owned.setdefault(tenant, {})
        if digest not in digests:
            self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) + size
        digests[digest] = used_at
        if digest not in self._sizes:
            self._sizes[digest] = size
            self.bytes_stored += size

    # -- questions --------------------------------------------------------------------------------------------------

    def owns(self, tenant: str, digest: str) -> bool:
        return digest in self._owned.get(tenant, ())

    def size(self, tenant: str, digest: str) -> int:
        if not self.owns(tenant, digest):
            raise _no_such(digest)
        return self._sizes[digest]

    def stat(self, tenant: str, digest: str) -> tuple[bool, int]:
        """Return (complete, bytes received). Says the same for what others have and for what nobody has."""
        upload = self._uploads.get((tenant, digest))
        if upload is not None:
            return False, upload.progress.received_bytes
        if self.owns(tenant, digest):
            return True, self._sizes[digest]
        path = self._files.partial_path(tenant, digest)
        try:
            return False, path.stat().st_size
        except FileNotFoundError:
            return False, 0

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
            done((self._sizes[digest], True))
            return
        upload = self._uploads.get((tenant, digest)) or self._begin(tenant, digest, total_bytes)
        self._check_chunk(upload, offset, total_bytes, len(data))
        if offset < upload.submitted_bytes:  # sent again: what was received already is skipped
            data = memoryview(data)[upload.submitted_bytes - offset :]
            offset = upload.submitted_bytes
            if not len(data):  # answer once what came before is on the disk
                self._disk.submit(digest, lambda: None, lambda _: done(self._progress(tenant, digest)))
                return
        self._make_room(len(data))
        last = offset + len(data) == total_bytes

        def write() -> None:
            if upload.progress.received_bytes != offset:
                raise FailedPreconditionError(
                    f"the chunk before offset {offset} was not stored", fix="ask StatResource"
                )
            self._files.append(upload.path, upload.progress, data)
            if last:
                self._files.finish(upload.path, upload.progress, digest)

        self._disk.submit(digest, write, lambda outcome: self._written(tenant, digest, len(data), last, outcome, done))
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

    def _begin(self, tenant: str, digest: str, total_bytes: int) -> _Upload:
        if total_bytes < 1:
            raise InvalidArgumentError("a resource cannot be empty", fix="give its size as total_bytes")
        number = len(self._owned.get(tenant, ())) + sum(1 for owner, _ in self._uploads if owner == tenant)
        if number >= self._counts.resources_per_tenant:
            raise ResourceExhaustedError(
                f"{number} resources are stored for this tenant (limits.resources_per_tenant)",
                fix="ask the operator to raise it",
            )
        used = self._tenant_bytes.get(tenant, 0)
        if used + total_bytes > self._limits.tenant_bytes:
            raise ResourceExhaustedError(
                f"a resource of {total_bytes} bytes does not fit: {used} of {self._limits.tenant_bytes} bytes are used "
                "(store.tenant_bytes)",
                fix="use fewer resources, or ask the operator to raise it",
            )
        path = self._files.partial_path(tenant, digest)
        try:
            received = path.stat().st_size
        except FileNotFoundError:
            received = 0
        if received >= total_bytes:  # left by a crash between the last chunk and the final name
            self.bytes_stored -= received
            path.unlink(missing_ok=True)
            received = 0
        upload = _Upload(path, received, total_bytes)
        self._uploads[tenant, digest] = upload
        self._tenant_bytes[tenant] = used + total_bytes
        return upload

    @staticmethod
    def _check_chunk(upload: _Upload, offset: int, total_bytes: int, length: int) -> None:
        if total_bytes != upload.total_bytes:
            raise InvalidArgumentError(
                f"this upload was announced with {upload.total_bytes} bytes, now with {total_bytes}",
                fix="send the same total_bytes with every chunk",
            )
        if not length or offset + length > total_bytes:
            raise InvalidArgumentError(
                f"a chunk of {length} bytes at offset {offset} is not part of {total_bytes} bytes",
                fix="send non-empty chunks that end at total_bytes",
            )
        if offset > upload.submitted_bytes:
            raise FailedPreconditionError(
                f"a chunk at offset {offset} would leave a hole: {upload.submitted_bytes} bytes were received",
                fix=f"send the chunk at offset {upload.submitted_bytes}",
            )

    def _progress(self, tenant: str, digest: str) -> tuple[int, bool]:
        complete, received = self.stat(tenant, digest)
        return received, complete

    def _written(
        self, tenant: str, digest: str, length: int, last: bool, outcome: RemoraError | None, done: PutDone
    ) -> None:
        upload = self._uploads.get((tenant, digest))
        if upload is None:  # the tenant was dropped meanwhile
            self._disk.submit(digest, lambda: self._files.discard(self._files.partial_path(tenant, digest)), _ignore)
            done(outcome if isinstance(outcome, RemoraError) else _no_such(digest))
            return
        if isinstance(outcome, RemoraError):
            self._failed(tenant, digest, upload, outcome)
            done(outcome)
            return
        if not last:
            self.bytes_stored += length
            upload.counted_bytes += length
            done((upload.progress.received_bytes, False))
            return
        self._acknowledge(tenant, digest, upload, done)

    def _acknowledge(self, tenant: str, digest: str, upload: _Upload, done: PutDone) -> None:
        """The file is safe; say so only when its owner is, too."""
        size, now = upload.total_bytes, self._clock()
        self.bytes_stored -= upload.counted_bytes  # it is counted as a resource from now on

        def committed(error: RemoraError | None) -> None:
            self._uploads.pop((tenant, digest), None)
            self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) - size
            if error is not None:
                done(error)
                return
            self._own(tenant, digest, size, now)
            self._verified.pop(digest, None)
            done((size, True))

        self._journal.write(
            ("INSERT OR REPLACE INTO resources VALUES (?,?)", (digest, size)),
            ("INSERT OR REPLACE INTO owners VALUES (?,?,?)", (tenant, digest, now)),
            durable=True,
            done=committed,
        )

    def _failed(self, tenant: str, digest: str, upload: _Upload, error: RemoraError) -> None:
        """Forget the upload in memory; the bytes that are on the disk and right stay for a resume."""
        self._uploads.pop((tenant, digest), None)
        self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) - upload.total_bytes
        if isinstance(error, DataLossError):  # the file is gone
            self.bytes_stored -= upload.counted_bytes
        if isinstance(error, ResourceExhaustedError):
            self._evict_unheld(upload.total_bytes)

    # -- use --------------------------------------------------------------------------------------------------------

    def open(self, tenant: str, digest: str, done: Callable[[Path | RemoraError], None]) -> None:
        """Hand out the file of a tenant's resource, after checking its bytes since it last changed.

        A damaged file is removed and forgotten, so that the tenant can upload it again.
        """
        if not self.owns(tenant, digest):
            done(_no_such(digest))
            return
        path = self._files.path(digest)

        def check() -> tuple[int, int, int]:
            try:
                status = path.stat()
            except OSError as error:
                raise DataLossError(f"the file of {digest} is gone", fix="upload the resource again") from error
            stamp = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
            if self._verified.get(digest) != stamp:
                self._files.verify(path, digest)
            return stamp

        def checked(outcome: tuple[int, int, int] | RemoraError) -> None:
            if isinstance(outcome, DataLossError):
                self._forget(digest)
            if isinstance(outcome, RemoraError):
                done(outcome)
                return
            self._verified[digest] = outcome
            done(path)

        self._disk.submit(digest, check, checked)

    def hold(self, tenant: str, digest: str) -> None:
        """Keep a resource while a session uses it."""
        self._holds[tenant, digest] += 1
        self._held[digest] += 1

    def unhold(self, tenant: str, digest: str) -> None:
        self._held[digest] -= 1
        self._holds[tenant, digest] -= 1
        if not self._held[digest]:
            del self._held[digest]
        if self._holds[tenant, digest]:
            return
        del self._holds[tenant, digest]
        if self.owns(tenant, digest):
            now = self._clock()
            self._owned[tenant][digest] = now
            self._journal.write(("UPDATE owners SET used_at=? WHERE tenant=? AND digest=?", (now, tenant, digest)))

    def grant(self, tenant: str, digests: Iterable[str]) -> None:
        """Make a clone's tenant an owner of what its template uploaded."""
        now = self._clock()
        for digest in digests:
            if digest in self._sizes and not self.owns(tenant, digest):
                self._own(tenant, digest, self._sizes[digest], now)
                self._journal.write(("INSERT OR REPLACE INTO owners VALUES (?,?,?)", (tenant, digest, now)))

    # -- getting rid of things --------------------------------------------------------------------------------------

    def release(self, tenant: str, digest: str) -> None:
        """The tenant gives a resource up; the bytes go when nobody else has them."""
        if (tenant, digest) not in self._holds:
            self._disown(tenant, digest)

    def drop_tenant(self, tenant: str) -> None:
        """Forget a tenant that will not come back, with its unfinished uploads."""
        for owner, digest in [key for key in self._uploads if key[0] == tenant]:
            upload = self._uploads.pop((owner, digest))
            self.bytes_stored -= upload.counted_bytes
            self._disk.submit(digest, partial(self._files.discard, upload.path), _ignore)
        for digest in list(self._owned.get(tenant, ())):
            self._disown(tenant, digest)
        self._owned.pop(tenant, None)
        self._tenant_bytes.pop(tenant, None)

    def sweep(self) -> None:
        """Remove what nobody used for long; called now and then."""
        oldest = self._clock() - self._limits.max_age_s
        for tenant, digests in list(self._owned.items()):
            for digest, used_at in list(digests.items()):
                if used_at < oldest and (tenant, digest) not in self._holds:
                    self._disown(tenant, digest)
        self._expire_partials()

    def _expire_partials(self) -> None:
        oldest = self._clock() - self._limits.partial_age_s
        busy = {upload.path for upload in self._uploads.values()}
        for path, size, written_at in self._files.partials():
            if written_at < oldest and path not in busy:
                self._files.discard(path)
                self.bytes_stored -= size

    def _disown(self, tenant: str, digest: str) -> None:
        if self._owned.get(tenant, {}).pop(digest, None) is None:
            return
        self._tenant_bytes[tenant] -= self._sizes[digest]
        self._journal.write(("DELETE FROM owners WHERE tenant=? AND digest=?", (tenant, digest)))
        if not any(digest in digests for digests in self._owned.values()):
            self._forget(digest)

    def _forget(self, digest: str) -> None:
        """Remove a resource for all its owners."""
        size = self._sizes.pop(digest, None)
        if size is None:
            return
        self.bytes_stored -= size
        for tenant, digests in self._owned.items():
            if digests.pop(digest, None) is not None:
                self._tenant_bytes[tenant] -= size
        self._verified.pop(digest, None)
        self._journal.write(
            ("DELETE FROM owners WHERE digest=?", (digest,)), ("DELETE FROM resources WHERE digest=?", (digest,))
        )

        def remove() -> None:
            self._files.discard(self._files.path(digest))

        self._disk.submit(digest, remove, _ignore)

    def _make_room(self, size: int) -> None:
        missing = self.bytes_stored + size - self._limits.total_bytes
        if missing > 0 and self._evict_unheld(missing) < missing:
            raise ResourceExhaustedError(
                f"the store holds {self.bytes_stored} of {self._limits.total_bytes} bytes (store.total_bytes), "
                "and sessions use all of them",
                fix="try again later, or ask the operator to raise it",
            )

    def _evict_unheld(self, wanted_bytes: int) -> int:
        """Remove the least recently used resources that no session holds; return the bytes they took."""
        last_used: dict[str, float] = {}
        for digests in self._owned.values():
            for digest, used_at in digests.items():
                last_used[digest] = max(used_at, last_used.get(digest, 0.0))
        freed = 0
        for digest in sorted(last_used, key=lambda name: last_used[name]):
            if freed >= wanted_bytes:
                break
            if digest not in self._held:
                freed += self._sizes[digest]
                self._forget(digest)
        return freed


def _ignore(_outcome: object) -> None:
    """Nobody waits for the end of this work."""
