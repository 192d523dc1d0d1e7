"""Resource files on the disk: the blocking half of the store, run in the disk threads.

    <state>/resources/<first two digits>/<64 digits>   complete: verified, synced, named by what it holds
    <state>/partial/<tenant's hash>/<64 digits>        an upload under way; its size is how far it got
    <state>/replaced/<number>                          what a finished upload took the place of, until it is removed

A file gets its final name only after its bytes have the right digest and are on the disk, and the name itself is
synced before anyone is told: what was acknowledged survives SIGKILL and power loss. No knowledge of tenants' rights.

Two tenants may upload the same bytes, and neither may learn it from how long that takes: an upload goes through the
same steps whether its name was taken or not, and what it replaces is removed later (`clear_replaced`).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from remora.errors import DataLossError, RemoraError, ResourceExhaustedError

_BLOCK_BYTES = 1 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Hash(Protocol):
    """The part of hashlib's objects that is used here."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Progress:
    """How far one upload got. `hasher` has seen all of the file, or is None (after a restart)."""

    __slots__ = ("hasher", "received_bytes")

    def __init__(self, received_bytes: int) -> None:
        self.received_bytes = received_bytes
        self.hasher: Hash | None = hashlib.sha256() if not received_bytes else None


def digest_of(data: bytes | memoryview) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def disk_full() -> RemoraError:
    return ResourceExhaustedError(
        "the agent's disk is full", fix="unload what you no longer need, or ask the operator to free space"
    )


@contextmanager
def _space_is_an_answer() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise disk_full() from error
        raise


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb", buffering=0) as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


#: Which file it is and when its bytes last changed: inode, mtime, size. Not ctime, which links change, too.
Stamp = tuple[int, int, int]


#: Of the file that had an upload's name before it, if there was one, and of the upload.
Replaced = tuple[Stamp | None, Stamp]


def stamp(path: Path) -> Stamp | None:
    """Return what tells a file from any other and from itself once it is changed; None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class ResourceFiles:
    """The directories, and what may be done in them."""

    def __init__(self, state: Path) -> None:
        self.resources = state / "resources"
        self.partial = state / "partial"
        self._replaced = state / "replaced"
        for directory in (self.resources, self.partial, self._replaced):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(256):  # now: making one during an upload would tell that nobody had such a digest
            (self.resources / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        _sync_directory(self.resources)
        self._numbers = itertools.count()
        self.clear_replaced()

    def path(self, digest: str) -> Path:
        hexadecimal = digest.removeprefix("sha256:")
        return self.resources / hexadecimal[:2] / hexadecimal

    def partial_path(self, tenant: str, digest: str) -> Path:
        """A tenant's name may hold any character, its directory's does not."""
        owner = hashlib.sha256(tenant.encode()).hexdigest()[:32]
        return self.partial / owner / digest.removeprefix("sha256:")

    def append(self, path: Path, progress: Progress, data: memoryview | bytes) -> None:
        """Write `data` at the end of a partial file; on a full disk nothing of it stays.

        Raises:
            ResourceExhaustedError: no space.
        """
        with _space_is_an_answer():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                view, position = memoryview(data), progress.received_bytes
                while len(view):
                    written = os.pwrite(fd, view, position)
                    view, position = view[written:], position + written
            except OSError:
                os.ftruncate(fd, progress.received_bytes)
                if not progress.received_bytes:
                    self.discard(path)
                raise
            finally:
                os.close(fd)
        if progress.hasher is not None:
            progress.hasher.update(data)
        progress.received_bytes = position

    def finish(self, path: Path, progress: Progress, digest: str) -> Replaced:
        """Verify a complete upload and give it its name.

        Raises:
            DataLossError: its bytes have another digest; the file is gone.
            ResourceExhaustedError: no space.
        """
        if progress.hasher is not None:
            found = f"sha256:{progress.hasher.hexdigest()}"
        else:
            found = file_digest(path)
        if found != digest:
            path.unlink(missing_ok=True)
            raise DataLossError(
                f"the {progress.received_bytes} bytes uploaded as {digest} have the digest {found}",
                fix="upload the resource again from offset 0, under the digest of its bytes",
            )
        final = self.path(digest)
        with _space_is_an_answer():
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            before = stamp(final)
            # Removing a file takes as long as it is large, so what is replaced only gets another name for now; where
            # nothing is, the new file gets one, too.
            os.link(path if before is None else final, self._replaced / f"{next(self._numbers)}")
            path.replace(final)
            _sync_directory(final.parent)
            after = stamp(final)
        if after is None:
            raise DataLossError(f"the file of {digest} is gone", fix="upload the resource again")
        return before, after

    def clear_replaced(self) -> None:
        """Remove what uploads have replaced."""
        for name in os.listdir(self._replaced):
            (self._replaced / name).unlink(missing_ok=True)

    def discard(self, path: Path) -> None:
        """Remove a file; with the last of a tenant's unfinished uploads, their directory."""
        path.unlink(missing_ok=True)
        if path.parent.parent != self.partial:
            return
        try:
            path.parent.rmdir()
        except OSError:
            pass  # not empty, or gone already: both are fine

    @staticmethod
    def verify(path: Path, digest: str) -> None:
        """Read a whole file.

        Raises:
            DataLossError: it is gone, or its bytes are not those it is named by.
        """
        try:
            found = file_digest(path)
        except OSError as error:
            raise DataLossError(
                f"the file of {digest} cannot be read: {error.strerror}", fix="upload the resource again"
            ) from error
        if found != digest:
            raise DataLossError(f"the stored bytes of {digest} are damaged", fix="upload the resource again")

    def complete(self) -> dict[str, int]:
        """Return digest and size of every complete file."""
        return {f"sha256:{path.name}": found.st_size for path, found in _files_below(self.resources)}

    def partials_of(self, tenant: str) -> list[tuple[Path, int]]:
        """Return path and size of a tenant's unfinished uploads."""
        directory = self.partial_path(tenant, "sha256:any").parent
        return [(path, found.st_size) for path, found in _files_in(directory)]

    def partials(self) -> list[tuple[Path, int, float]]:
        """Return path, size and time of the last chunk of every unfinished upload."""
        return [(path, found.st_size, found.st_mtime) for path, found in _files_below(self.partial)]


def _files_in(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of a directory; what a disk thread removes meanwhile is left out."""
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            path = directory / name
            with suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found


def _files_below(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of all directories in a directory."""
    for name in os.listdir(directory):
        if (directory / name).is_dir():
            yield from _files_in(directory / name)
