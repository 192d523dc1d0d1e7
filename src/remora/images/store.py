"""The image store: every layer once, by the digest of its content, for all images and all microVMs of a host.

    <root>/records/NAME.json    an image: name, digest, ordered layers, configuration
    <root>/layers/SHA256.erofs  a layer, named by the digest of its plain tar (OCI's diff-id)
    <root>/merged/SHA256.json   which layers a merged one stands for (see flatten.py)
    <root>/tmp/                 what is being made; the maker holds a lock on it, what nobody holds is swept

Whoever uses a layer holds a shared flock(2) on its file: a sandbox through `hold`, an import through `Adding` until its
record is written. The collector takes only what it can lock exclusively. All of this ends with its process, so a
SIGKILL at any moment leaves a store that the next command can use.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from remora import paths
from remora.errors import DataLossError, FailedPreconditionError, NotFoundError, ResourceExhaustedError
from remora.images.locks import is_at, locked, locked_once, try_lock
from remora.images.model import Image, ImageConfig, full_name

_RECORD_VERSION = 1


class ImageStore:
    """The images of one root directory (default: `images` in Remora's state directory)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else paths.state_dir() / "images"
        self.layers_dir = self.root / "layers"
        self.tmp_dir = self.root / "tmp"
        self._records = self.root / "records"
        self._merged = self.root / "merged"
        self._lock = self.root / "lock"

    def get(self, name: str) -> Image:
        """Return the image called `name` (tag `latest` unless given).

        Raises:
            NotFoundError: there is none of that name.
            DataLossError: its record or one of its layers is damaged or missing.
        """
        full = full_name(name)
        try:
            image = self._read(self._record_path(full))
        except FileNotFoundError:
            known = ", ".join(image.name for image in self.list()[:8]) or "none yet"
            raise NotFoundError(
                f"no image is called {full}; there are: {known}", fix="see remora image import, pull and build"
            ) from None
        for layer in image.layers:
            if not layer.is_file():
                raise DataLossError(
                    f"the layer {layer.name} of the image {full} is missing", fix="import the image again"
                )
        return image

    def list(self) -> list[Image]:
        """Return all images, by name."""
        if not self._records.is_dir():
            return []
        found = []
        for path in self._records.glob("*.json"):
            try:
                found.append(self._read(path))
            except FileNotFoundError:
                continue  # removed since the directory was read
        return sorted(found, key=lambda image: image.name)

    def remove(self, name: str) -> int:
        """Remove an image and the layers that nothing else needs; return the bytes that became free.

        Raises:
            NotFoundError: there is none of that name.
            FailedPreconditionError: a running sandbox uses a layer that only this image has.
        """
        full = full_name(name)
        with self._changing():
            self.get_record(full)
            path = self._record_path(full)
            referenced = self._referenced(without=path)
            ours = self._read(path)
            with ExitStack() as stack:
                for layer in {layer for layer in ours.layers if layer.stem not in referenced and layer.exists()}:
                    fd = try_lock(layer)
                    if fd is None:
                        raise FailedPreconditionError(
                            f"the image {full} is in use by a running sandbox", fix="stop it first; see remora ps"
                        )
                    stack.callback(os.close, fd)
            path.unlink()
            return self._collect()

    def get_record(self, name: str) -> Path:
        """Return the path of an image's record, or raise `NotFoundError`."""
        path = self._record_path(full_name(name))
        if not path.exists():
            self.get(name)
        return path

    @contextmanager
    def hold(self, image: Image) -> Iterator[Image]:
        """Keep the layers of `image` in the store while the context is open.

        Raises:
            NotFoundError: a layer was removed since `get`.
        """
        with ExitStack() as stack:
            with locked(self._lock, shared=True):
                for layer in image.layers:
                    try:
                        fd = os.open(layer, os.O_RDONLY | os.O_CLOEXEC)
                    except FileNotFoundError:
                        raise NotFoundError(f"the image {image.name} was removed", fix="import it again") from None
                    stack.callback(os.close, fd)
                    fcntl.flock(fd, fcntl.LOCK_SH)
            yield image

    @contextmanager
    def adding(self) -> Iterator[Adding]:
        """Open a transaction that adds layers and then an image; nothing of it shows before `Adding.commit`."""
        with ExitStack() as stack, disk_errors(self.root):
            for directory in (self.layers_dir, self.tmp_dir, self._records, self._merged):
                directory.mkdir(parents=True, exist_ok=True)
            with self._changing():
                self._sweep()
            try:
                yield Adding(self, stack)
            finally:
                stack.close()
                with self._changing():
                    self._collect()

    def layer_path(self, diff_id: str) -> Path:
        """Return where the layer with this digest is or would be."""
        return self.layers_dir / f"{diff_id.removeprefix('sha256:')}.erofs"

    # What follows is for Adding and for this class alone.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        if not self.root.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
        with locked(self._lock):
            yield

    def _record_path(self, full: str) -> Path:
        return self._records / f"{quote(full, safe='')}.json"

    def _read(self, path: Path) -> Image:
        try:
            record = json.loads(path.read_text())
            if record["version"] != _RECORD_VERSION:
                raise DataLossError(f"{path} was written by another version of Remora", fix="import the image again")
            return Image(
                name=record["name"],
                digest=record["digest"],
                layers=tuple(self.layer_path(diff_id) for diff_id in record["layers"]),
                config=ImageConfig.from_dict(record["config"]),
                architecture=record["architecture"],
                created=record["created"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataLossError(
                f"the image record {path} is damaged: {error}", fix="delete it; import again"
            ) from error

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:  # Any: JSON
        with tempfile.NamedTemporaryFile("w", dir=self.tmp_dir, delete=False) as file:
            try:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        sync_directory(path.parent)

    def _referenced(self, without: Path | None = None) -> set[str]:
        images = [self._read(path) for path in self._records.glob("*.json") if path != without]
        stacks = [[layer.stem for layer in image.layers] for image in images]
        found = {stem for stack in stacks for stem in stack}
        for path in self._merged.glob("*.json"):
            part = json.loads(path.read_text())["layers"]
            if any(stack[: len(part)] == part for stack in stacks):
                found.add(path.stem)
        return found

    def _collect(self) -> int:
        """Delete every layer that no record needs and nobody holds; return the bytes freed. Needs the lock."""
        referenced = self._referenced()
        freed = 0
        for layer in self.layers_dir.glob("*.erofs"):
            if layer.stem in referenced or (fd := try_lock(layer)) is None:
                continue
            freed += os.fstat(fd).st_size
            layer.unlink()
            os.close(fd)
        for path in self._merged.glob("*.json"):
            if path.stem not in referenced and not (self.layers_dir / f"{path.stem}.erofs").exists():
                path.unlink()
        return freed

    def _sweep(self) -> None:
        """Delete what a killed process left in the making. Needs the lock."""
        for path in self.tmp_dir.iterdir():
            fd = try_lock(path)
            if fd is None:
                continue
            try:
                remove_tree(path)
            finally:
                os.close(fd)


class Adding:
    """Layers on their way into the store; see `ImageStore.adding`."""

    def __init__(self, store: ImageStore, stack: ExitStack) -> None:
        self._store = store
        self._stack = stack

    def layer(self, diff_id: str, write: Callable[[BinaryIO], object]) -> Path:
        """Return the layer named `diff_id`, made by `write(file)` unless the store has it; held until the end."""
        path = self._store.layer_path(diff_id)
        with locked_once(self._store.tmp_dir / f"{path.stem}.lock"):
            if not self._hold_present(path):
                self._make(path, write)
        return path

    def merged_layer(self, digest: str, parts: tuple[str, ...], write: Callable[[BinaryIO], object]) -> Path:
        """Like `layer`, for one that stands for `parts`: it lives as long as an image has these lowest layers."""
        stems = [part.removeprefix("sha256:") for part in parts]
        path = self._store._merged / f"{digest.removeprefix('sha256:')}.json"
        with self._store._changing():
            self._store._write_json(path, {"version": _RECORD_VERSION, "layers": stems})
        return self.layer(digest, write)

    def scratch_file(self) -> BinaryIO:
        """Return an empty file on the store's disk that is gone when the transaction ends."""
        return self._stack.enter_context(tempfile.TemporaryFile(dir=self._store.tmp_dir))

    def scratch_dir(self) -> Path:
        """Return an empty directory on the store's disk that is gone when the transaction ends."""
        with locked(self._store._lock, shared=True):
            path = Path(tempfile.mkdtemp(dir=self._store.tmp_dir))
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
        self._stack.callback(os.close, fd)
        self._stack.callback(remove_tree, path)
        return path

    def commit(
        self, name: str, digest: str, layers: tuple[str, ...], config: ImageConfig, architecture: str, created: str
    ) -> Image:
        """Write the record of an image whose layers were all added here; it replaces one of the same name."""
        full = full_name(name)
        with self._store._changing():
            self._store._write_json(
                self._store._record_path(full),
                {
                    "version": _RECORD_VERSION,
                    "name": full,
                    "digest": digest,
                    "layers": list(layers),
                    "config": config.to_dict(),
                    "architecture": architecture,
                    "created": created,
                },
            )
        return self._store.get(full)

    def _hold_present(self, path: Path) -> bool:
        with locked(self._store._lock, shared=True):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            self._stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return True

    def _make(self, path: Path, write: Callable[[BinaryIO], object]) -> None:
        with locked(self._store._lock, shared=True):  # no sweep between its creation and its lock
            fd, name = tempfile.mkstemp(suffix=".erofs", dir=self._store.tmp_dir)
            fcntl.flock(fd, fcntl.LOCK_SH)  # shared is enough: a sweeper wants it exclusively
        temporary = Path(name)
        kept = False
        try:
            with open(fd, "r+b", closefd=False) as file:
                write(file)
                file.flush()
            os.fchmod(fd, 0o444)
            os.fsync(fd)
            with self._store._changing():
                if not is_at(fd, temporary):
                    raise DataLossError(f"{temporary} disappeared while it was written", fix="try again")
                os.replace(temporary, path)
            sync_directory(path.parent)
            kept = True
        finally:
            if kept:
                self._stack.callback(os.close, fd)
            else:
                os.close(fd)
                temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(
                f"no space left on the disk of {where}", fix="free some, or point REMORA_STATE_DIR to another disk"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise FailedPreconditionError(
                f"cannot write to {error.filename or where}", fix="run as its owner, or set REMORA_STATE_DIR"
            ) from error
        raise


def remove_tree(path: Path) -> None:
    """Delete a file or a whole directory; nothing happens when it is gone."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove_tree(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
