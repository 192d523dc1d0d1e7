"""Files that an installation put on a node: written only where they differ, written down, and taken away again.

The record is what makes `uninstall` exact: a file that was there before or was changed since is not ours to remove. It
is written before the first file, so that an installation that was cut off can be taken back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.errors import FailedPreconditionError

RECORD = "/etc/remora/installed.json"


@dataclass(frozen=True)
class File:
    """One file that the node is to have; `path` as the node sees it."""

    path: str
    content: bytes
    mode: int = 0o644
    #: The operator may change it: an existing one stays as it is.
    theirs: bool = False


@dataclass(frozen=True)
class Change:
    """What was or would be done: `write`, `keep`, `remove`, `leave`, `restart`, and why."""

    action: str
    path: str
    why: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"action": self.action, "path": self.path, "why": self.why}


@dataclass
class Record:
    """What an installation put on the node: digests of files, directories, and how it found containerd's file."""

    files: dict[str, str] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    #: Directories with all that is in them.
    trees: list[str] = field(default_factory=list)
    config: str = ""
    #: The copy of containerd's configuration; empty if there was none.
    backup: str = ""
    #: The installation wrote the whole main file.
    created_config: bool = False
    #: containerd has not read it yet: the attempt to restart it failed.
    restart_due: bool = False

    def to_json(self) -> bytes:
        return (json.dumps(self.__dict__, indent=2, sort_keys=True) + "\n").encode()


class Node:
    """A node's files below `root`: `/`, or where a container has the node's root mounted."""

    def __init__(self, root: Path, *, dry_run: bool = False) -> None:
        self._root = root
        self.dry_run = dry_run
        self.changes: list[Change] = []

    def at(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def read(self, path: str) -> bytes | None:
        try:
            return self.at(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def mode(self, path: str) -> int:
        """Return a file's mode, that of a new one if it does not exist."""
        try:
            return self.at(path).stat().st_mode & 0o7777
        except FileNotFoundError:
            return 0o644

    @property
    def changed(self) -> bool:
        return any(change.action in ("write", "remove") for change in self.changes)

    # -- the record -------------------------------------------------------------------------------------------------

    def load(self) -> Record | None:
        """
        Raises:
            FailedPreconditionError: the record cannot be read: nobody knows what to remove.
        """
        found = self.read(RECORD)
        if found is None:
            return None
        try:
            values: dict[str, Any] = json.loads(found)
            return Record(**values)
        except (ValueError, TypeError) as error:
            raise FailedPreconditionError(
                f"the record {self.at(RECORD)} cannot be read: {error}",
                fix="remove it and install again, then uninstall",
            ) from error

    def save(self, record: Record) -> None:
        if not self.dry_run and self.read(RECORD) != record.to_json():
            self._put(RECORD, record.to_json(), 0o644)

    def keep_record(self, record: Record, files: Iterable[File]) -> None:
        """Write down what is about to be written, before it is."""
        for file in files:
            if not (file.theirs and self.read(file.path) is not None and file.path not in record.files):
                record.files[file.path] = _digest(file.content)
        for path in (RECORD, *record.files, *record.trees):
            self._note_directories(record, path)
        self.save(record)

    def _note_directories(self, record: Record, path: str) -> None:
        directory = os.path.dirname(path)
        missing = []
        while directory != "/" and not self.at(directory).exists():
            missing.append(directory)
            directory = os.path.dirname(directory)
        record.directories += [one for one in missing if one not in record.directories]

    # -- files ------------------------------------------------------------------------------------------------------

    def write(self, file: File) -> bool:
        """Write a file if the node's differs; True if it did."""
        before = self.read(file.path)
        if before is not None and (file.theirs or self._is(file, before)):
            self.changes.append(Change("keep", file.path, "the operator's" if file.theirs else "as it should be"))
            return False
        self.changes.append(Change("write", file.path, "new" if before is None else "differs"))
        if not self.dry_run:
            self._put(file.path, file.content, file.mode)
        return True

    def remove(self, path: str, digest: str | None = None) -> bool:
        """Remove a file, only as it was written if `digest` is given; True if it went."""
        before = self.read(path)
        if before is None:
            return False
        if digest is not None and _digest(before) != digest:
            self.changes.append(Change("leave", path, "changed since it was installed"))
            return False
        self.changes.append(Change("remove", path))
        if not self.dry_run:
            self.at(path).unlink()
        return True

    def remove_tree(self, path: str) -> None:
        if self.at(path).exists():
            self.changes.append(Change("remove", path))
            if not self.dry_run:
                shutil.rmtree(self.at(path))

    def remove_directories(self, paths: Sequence[str]) -> None:
        """Remove those that are empty, the deepest first."""
        if self.dry_run:
            return
        for path in sorted(paths, key=len, reverse=True):
            try:
                self.at(path).rmdir()
            except OSError:
                continue  # somebody else's files are in it

    def _is(self, file: File, before: bytes) -> bool:
        return before == file.content and self.at(file.path).stat().st_mode & 0o7777 == file.mode

    def _put(self, path: str, content: bytes, mode: int) -> None:
        target = self.at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.remora")
        with open(draft, "wb") as out:
            os.fchmod(out.fileno(), mode)
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(target)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
