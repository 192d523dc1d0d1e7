"""Packs files of a build into a tar whose bytes depend on their content alone: sorted, owned by root, one time."""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from remora.errors import InvalidArgumentError
from remora.images.erofs import Node
from remora.images.erofs_read import ErofsReader
from remora.images.layer import is_whiteout

_LEFT_OUT = frozenset({"__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache"})
_MAX_LINKS = 40


class LowerLayers:
    """Looks up paths in the layers that a build stands on."""

    def __init__(self, layers: tuple[Path, ...]) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._readers = [opening.enter_context(ErofsReader(layer)) for layer in reversed(layers)]
            self._stack = opening.pop_all()

    def __enter__(self) -> LowerLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def lookup(self, path: str) -> Node | None:
        """Return what the topmost layer that knows `path` has there."""
        for reader in self._readers:
            node = reader.lookup(path)
            if node is not None:
                return None if is_whiteout(node) else node
        return None

    def names(self, path: str) -> set[str]:
        """Return all names that any layer has in a directory."""
        return {name for reader in self._readers for name in reader.names(path)}

    def real_directory(self, path: str) -> str:
        """Return the directory that `path` means once its symbolic links are followed (/bin may be one)."""
        left = [part for part in path.split("/") if part]
        done = "/"
        links = 0
        while left:
            part = left.pop(0)
            if part in (".", ".."):
                done = posixpath.normpath(posixpath.join(done, part))
                continue
            step = posixpath.join(done, part)
            node = self.lookup(step)
            if node is None or not stat.S_ISLNK(node.mode):
                done = step
                continue
            links += 1
            if links > _MAX_LINKS:
                raise InvalidArgumentError(f"{path} runs through a circle of symbolic links in the base image")
            target = self._target(step)
            done = "/" if target.startswith("/") else done
            left = [part for part in target.split("/") if part] + left
        return done

    def _target(self, path: str) -> str:
        for reader in self._readers:
            if (node := reader.lookup(path)) is not None:
                return os.fsdecode(b"".join(reader.data(node)))
        raise AssertionError("asked only for links that a layer has")


def write_tree_tar(
    tar: Path, files: dict[str, Path], lower: LowerLayers, mtime_s: int, *, keep_caches: bool = False
) -> None:
    """Write `files` (path in the image -> file or directory here) as a layer over `lower`.

    Directories on the way keep the owner and mode that they have below; new ones belong to root with mode 0755.
    Caches of tools and version control (`__pycache__`, `.git`) are left out unless `keep_caches`.
    """
    members: dict[str, Path | None] = {}
    for destination, source in files.items():
        clean = posixpath.normpath(destination)
        placed = posixpath.join(lower.real_directory(posixpath.dirname(clean)), posixpath.basename(clean))
        if source.is_dir() and not source.is_symlink():
            placed = lower.real_directory(clean)
        for path, file in _walk(source, frozenset() if keep_caches else _LEFT_OUT):
            members[posixpath.normpath(posixpath.join(placed, path))] = file
    for path in list(members):
        while (path := posixpath.dirname(path)) != "/":
            members.setdefault(path, None)
    members.pop("/", None)
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(members):
            _add(archive, path, members[path], lower, mtime_s)


def _walk(source: Path, left_out: frozenset[str]) -> Iterator[tuple[str, Path]]:
    yield "", source
    if source.is_dir() and not source.is_symlink():
        for child in sorted(source.iterdir()):
            if child.name not in left_out:
                for path, file in _walk(child, left_out):
                    yield posixpath.join(child.name, path), file


def _add(archive: tarfile.TarFile, path: str, file: Path | None, lower: LowerLayers, mtime_s: int) -> None:
    info = tarfile.TarInfo(path.lstrip("/"))
    info.mtime = mtime_s
    if file is None or (file.is_dir() and not file.is_symlink()):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        below = lower.lookup(path)
        if below is not None and below.is_dir:
            info.mode, info.uid, info.gid = stat.S_IMODE(below.mode), below.uid, below.gid
            info.mtime = below.mtime_s
        archive.addfile(info)
    elif file.is_symlink():
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, os.readlink(file)
        archive.addfile(info)
    elif file.is_file():
        about = file.stat()
        info.size, info.mode = about.st_size, 0o755 if about.st_mode & 0o111 else 0o644
        with open(file, "rb") as content:
            archive.addfile(info, content)
    else:
        raise InvalidArgumentError(f"{file} is neither a file, nor a directory, nor a link; it cannot go into an image")
