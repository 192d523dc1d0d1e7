"""What must outlive the agent: sessions, who holds which resource, attachments. SQLite, written by one thread.

Why a thread: a commit may wait for the disk, and the reactor must not. Why SQLite and not a file of our own: a commit
is atomic against SIGKILL and power loss, and `sqlite3` is in the standard library. Writes that wait together are
committed together, so that a thousand sessions opened at once cost a few commits.

Only what was acknowledged must survive a power loss (an upload, an attachment): such a write asks for `durable`,
everything else survives the death of the process but is not worth an fsync.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from remora.errors import FailedPreconditionError, InternalError, RemoraError, ResourceExhaustedError

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, token_hash BLOB, number INTEGER NOT NULL, owner TEXT NOT NULL, tenant TEXT NOT NULL,
  template INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS session_holds (
  session TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (session, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS session_models (
  session TEXT NOT NULL, model TEXT NOT NULL, format TEXT NOT NULL, PRIMARY KEY (session, model)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS resources (
  digest TEXT PRIMARY KEY, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (
  tenant TEXT NOT NULL, digest TEXT NOT NULL, used_at REAL NOT NULL, PRIMARY KEY (tenant, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attachments (
  sandbox TEXT PRIMARY KEY, tenant TEXT NOT NULL, labels TEXT NOT NULL, directory TEXT NOT NULL, parent TEXT NOT NULL,
  template INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attachment_cids (sandbox TEXT PRIMARY KEY, cid INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS grants (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, shares TEXT NOT NULL, per_device INTEGER NOT NULL, serial INTEGER NOT NULL,
  holder TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS found_sandboxes (sandbox TEXT PRIMARY KEY, tenant TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS vaccel_resources (
  tenant TEXT NOT NULL, id INTEGER NOT NULL, kind INTEGER NOT NULL, blobs TEXT NOT NULL,
  PRIMARY KEY (tenant, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS vaccel_registrations (
  session TEXT NOT NULL, resource INTEGER NOT NULL, PRIMARY KEY (session, resource)) WITHOUT ROWID;
"""

#: Called in the reactor's thread when the write is committed (None) or failed.
Done = Callable[[RemoraError | None], None]


@dataclass(frozen=True, slots=True)
class _Write:
    statements: Sequence[tuple[str, Sequence[Any]]]
    durable: bool
    done: Done | None


def _translate(error: sqlite3.Error, path: Path) -> RemoraError:
    if "full" in str(error):
        return ResourceExhaustedError("the agent's disk is full", fix="ask the operator to free space for the agent")
    return InternalError(f"the journal {path.name} could not be written: {error}")


def _answer(waiting: Sequence[Done], error: RemoraError | None) -> None:
    for done in waiting:
        done(error)


class Journal:
    """The agent's database. Read it before the reactor runs; afterwards only `write`."""

    def __init__(
        self,
        path: Path,
        post: Callable[[Callable[[], None]], None],
        on_failure: Callable[[RemoraError], None],
    ) -> None:
        """Open or create the database.

        Args:
            on_failure: Called in the reactor's thread when a write failed that nobody waits for.

        Raises:
            FailedPreconditionError: it is damaged, or written by a newer version.
        """
        self._path = path
        self._post = post
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        try:
            path.touch(mode=0o600)  # the files that SQLite puts beside it get the same mode
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                self._db.close()
                raise FailedPreconditionError(
                    f"the journal {path} has format {version}, this agent knows {_SCHEMA_VERSION}",
                    fix="run the agent version that wrote it, or give another --state directory",
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise FailedPreconditionError(
                f"the journal {path} cannot be used: {error}",
                fix="move it away: sessions and uploads start anew; or give another --state directory",
            ) from error
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def rows(self, statement: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Read; only while nothing is being written."""
        yield from self._db.execute(statement, values)

    def write(self, *statements: tuple[str, Sequence[Any]], durable: bool = False, done: Done | None = None) -> None:
        """Commit all statements or none, soon. Writes are committed in the order of these calls."""
        self._queue.put(_Write(statements, durable, done))

    def close(self) -> None:
        """Commit what waits, and end."""
        self._queue.put(None)
        self._thread.join()
        self._db.close()

    # -- the journal's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        ending = False
        while not ending:
            waiting = [self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get())
            ending = None in waiting
            self._commit([write for write in waiting if write is not None])

    def _commit(self, writes: list[_Write]) -> None:
        if not writes:
            return
        try:
            with self._transaction(durable=any(write.durable for write in writes)):
                for write in writes:
                    for statement, values in write.statements:
                        self._db.execute(statement, values)
            error: RemoraError | None = None
        except sqlite3.Error as failure:
            if len(writes) > 1:  # one bad write must not take the others along
                for write in writes:
                    self._commit([write])
                return
            error = _translate(failure, self._path)
        answered = [write.done for write in writes if write.done is not None]
        if error is not None and not answered:
            self._post(partial(self._on_failure, error))
        if answered:
            self._post(partial(_answer, answered, error))

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
