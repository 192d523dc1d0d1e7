"""The sandboxes of this host, as files: what lives where, under which name, and which of them are dead.

Each sandbox owns `<runtime>/s/<id>/` (mode 0700) with `state.json` and `lock`. The sandbox's keeper and monitor hold
an flock on `lock` for as long as one of them lives, so whoever can take that lock looks at a dead sandbox: no pid
files, no guessing. Names are given out under one lock for the whole directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from remora.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PermissionDeniedError
from remora.sandboxes.jailing import JailRequest, claim, jail_of

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_ID_BYTES = 6
STATE_FILE = "state.json"
LOCK_FILE = "lock"
#: Where the monitor takes requests of other commands.
MONITOR_SOCKET = "monitor.sock"
#: What a removed sandbox may still have in its directory once it has exited: its record and its output.
KEPT_FILES = (STATE_FILE, LOCK_FILE, "stdout.log", "stderr.log", "stdout.log.1", "stderr.log.1")


class Record(NamedTuple):
    """A sandbox as `state.json` describes it."""

    id: str
    directory: Path
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.fields.get("name", ""))

    @property
    def state(self) -> str:
        """`starting`, `running`, `stopping` or `exited`."""
        return str(self.fields.get("state", "starting"))

    @property
    def channel(self) -> Path:
        """The directory with the guest's channel."""
        jail = jail_of(self.fields)
        return self.directory if jail is None else jail.root


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"'{name}' cannot name a microVM",
            fix="use 1 to 63 letters, digits, dots, dashes or underscores, the first a letter or digit",
        )


class Registry:
    """The sandbox directories below one run-time directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self.root = runtime_dir / "s"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the whole directory, which is made if need be and removed again when it is empty."""
        runtime_dir = self.root.parent
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if runtime_dir.stat().st_uid != os.geteuid():
            raise PermissionDeniedError(
                f"the run-time directory {runtime_dir} belongs to another user",
                fix="set REMORA_RUNTIME_DIR to a directory of your own",
            )
        while True:
            self.root.mkdir(mode=0o700, exist_ok=True)
            try:
                fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                # Another command may have removed the empty directory between the two calls: then lock the new one.
                if _is_at(fd, self.root):
                    yield
                    return
            finally:
                with contextlib.suppress(OSError):
                    os.rmdir(self.root)
                os.close(fd)

    def create(self, fields: dict[str, Any], jail: JailRequest | None = None) -> tuple[Record, int]:
        """Make the directory of a new sandbox; returns it with the locked descriptor that keeps it alive.

        Args:
            jail: A jail to claim for it.

        Raises:
            AlreadyExistsError: another sandbox has that name.
        """
        name = fields.get("name", "")
        if name:
            check_name(name)
        with self._locked():
            self._clear_unfinished()
            if name:
                for other in self.all():
                    if other.name == name:
                        raise AlreadyExistsError(
                            f"a microVM named '{name}' exists ({other.state})",
                            fix=f"choose another name, or remove it: remora rm -f {name}",
                        )
            if jail is not None:
                fields = {**fields, "jail": claim(jail, [other.fields for other in self.all()])}
            sandbox_id = os.urandom(_ID_BYTES).hex()
            directory = self.root / sandbox_id
            directory.mkdir(mode=0o700)
            record = Record(sandbox_id, directory, {"id": sandbox_id, "state": "starting", **fields})
            lock_fd = -1
            try:
                lock_fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock_fd, fcntl.LOCK_EX)
                write_state(record)
            except BaseException:
                # A full disk must not be filled with empty directories.
                remove_flat(directory)
                if lock_fd >= 0:
                    os.close(lock_fd)
                raise
        return record, lock_fd

    def clear_unfinished(self) -> None:
        """Remove directories whose maker was killed before it could write down what they are for."""
        if self.root.exists():
            with self._locked():
                self._clear_unfinished()

    def _clear_unfinished(self) -> None:
        # Directories are made and removed under the lock that we hold: nobody is in the middle of that now.
        for entry in list(os.scandir(self.root)):
            directory = self.root / entry.name
            if not (directory / STATE_FILE).exists() and not is_locked(directory / LOCK_FILE):
                remove_flat(directory)

    def all(self) -> list[Record]:
        """Return every sandbox that has a readable record, oldest first."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.root):
                with contextlib.suppress(OSError, ValueError):
                    records.append(self._read(entry.name))
        return sorted(records, key=lambda record: (record.fields.get("created_s", 0), record.id))

    def find(self, wanted: str) -> Record:
        """Return the sandbox with this name, id, or unambiguous beginning of an id.

        Raises:
            NotFoundError: there is none.
        """
        records = self.all()
        exact = [r for r in records if wanted in (r.id, r.name)]
        matches = exact or [r for r in records if len(wanted) >= 3 and r.id.startswith(wanted)]
        if not matches:
            raise NotFoundError(f"no microVM is named '{wanted}'", fix="`remora ps -a` lists them")
        if len(matches) > 1:
            raise InvalidArgumentError(
                f"'{wanted}' stands for {len(matches)} microVMs", fix="write more of the id: `remora ps -a` shows them"
            )
        return matches[0]

    def reload(self, record: Record) -> Record | None:
        """Return the record as it is now; None if the sandbox is gone."""
        try:
            return self._read(record.id)
        except (OSError, ValueError):
            return None

    def _read(self, sandbox_id: str) -> Record:
        directory = self.root / sandbox_id
        return Record(sandbox_id, directory, json.loads((directory / STATE_FILE).read_text()))

    def dead(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield directories that no living process owns, with what their records say, each locked while it is out.

        Those of exited sandboxes that were already tidied up are left out.
        """
        self.clear_unfinished()
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(self.root)):
                directory = self.root / entry.name
                try:
                    lock_fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # it is going away
                try:
                    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fields: dict[str, Any] = {}
                    with contextlib.suppress(OSError, ValueError):
                        fields = json.loads((directory / STATE_FILE).read_text())
                    if fields.get("state") != "exited":
                        yield directory, fields
                except BlockingIOError:
                    continue
                finally:
                    os.close(lock_fd)

    def is_alive(self, record: Record) -> bool:
        """True while a monitor or keeper owns the sandbox."""
        return is_locked(record.directory / LOCK_FILE)

    def remove(self, directory: Path) -> None:
        """Remove a sandbox's directory, and that of all sandboxes if it was the last one."""
        with self._locked():
            remove_flat(directory)


def remove_flat(directory: Path) -> None:
    """Remove a directory of files, as far as it is there. (shutil's import costs a clone 6 ms.)"""
    with contextlib.suppress(FileNotFoundError):
        # Again where somebody, the agent say, still made a file in it.
        for _ in range(10):
            for entry in list(os.scandir(directory)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
            with contextlib.suppress(OSError):
                os.rmdir(directory)
                return


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """True while another process holds the flock on `path`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def write_state(record: Record) -> None:
    """Write `state.json` so that a reader sees the old or the new one, never half of one."""
    draft = record.directory / f".{STATE_FILE}.{os.getpid()}"
    draft.write_text(json.dumps(record.fields))
    draft.replace(record.directory / STATE_FILE)
