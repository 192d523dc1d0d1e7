"""Image layers as disks: what a snapshotter hands over, packed once per layer into a read-only image.

The overlayfs snapshotter names directories, one per layer, that never change once they are layers. Each is packed by
mkfs.erofs into `<state>/layers/<key>.erofs` the first time a microVM needs it (0.2 s for 40 MB), and shared by all
later ones through the host's page cache. Whiteouts survive, so an overlay in the guest shows exactly the image.

A directory that somebody may still write (a root that is given as one, a snapshot's upper layer) is packed as it is at
that moment, for this container alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from remora.errors import InvalidArgumentError, UnimplementedError
from remora.sha256 import hexdigest
from remora.shim.tools import run
from remora.wire.containerd import Mount

#: Packed layers kept; the ones longest unused go first. A microVM keeps its own files open, whatever is removed.
CACHE_BYTES = 32 << 30
#: Read-ahead in the guest looks a little beyond an image's end, and the slot is larger than the image.
_TAIL_BYTES = 1 << 20
#: Disks for one container; what an image has more is merged at the bottom, once per image.
MAX_PER_CONTAINER = 6


class LayerCache:
    """Packed layers below one state directory. Safe for many shims at a time."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / "layers"

    def images(self, rootfs: Sequence[Mount], root: str, own: Path) -> list[Path]:
        """Return the disk images of a container's root, lowest first.

        Args:
            rootfs: as Create has it; empty: the root is a directory already.
            root: that directory.
            own: where the image of what may change is put, which nobody else gets.

        Raises:
            UnimplementedError: a mount that only the host's kernel could make.
        """
        files, directories, changing = split(rootfs) if rootfs else ([], [], root)
        room = MAX_PER_CONTAINER - len(files) - bool(changing)
        merged = max(0, len(directories) - room + 1) if len(directories) > room else 1
        groups = [directories[:merged], *([one] for one in directories[merged:])]
        images = [*files, *(self._packed(group) for group in groups if group)]
        if changing:
            pack([changing], own)
            images.append(own)
        return images

    def _packed(self, layers: list[str]) -> Path:
        """Return the image of a layer, or of several merged (lowest first), made if it is not there."""
        path = self.directory / f"{_key(layers)}.erofs"
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._drop_drafts()
                self._pack(layers, path)
                self._evict()
        finally:
            os.close(lock)
        return path

    def _drop_drafts(self) -> None:
        """Remove what a shim that was killed while it packed has left; the lock says that nobody packs now."""
        for draft in list(self.directory.glob(".*")):
            if draft.is_dir():
                draft.rmdir()
            else:
                draft.unlink()

    def _pack(self, layers: list[str], path: Path) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pack(layers, draft)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _evict(self) -> None:
        entries = []
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".erofs") and not entry.name.startswith("."):
                info = entry.stat()
                entries.append((info.st_mtime, info.st_blocks * 512, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries)[:-1]:
            if total <= CACHE_BYTES:
                return
            os.unlink(path)
            total -= size


def pack(layers: list[str], target: Path) -> None:
    """Pack a directory, or what overlayfs shows of several (lowest first), into an erofs image."""
    if len(layers) == 1:
        run(["mkfs.erofs", "--quiet", str(target), layers[0]], package="erofs-utils")
    else:
        # In a mount namespace of its own: it cannot be left behind.
        script = 'mount -t overlay -o "ro,lowerdir=$1" overlay "$2" && exec mkfs.erofs --quiet "$3" "$2"'
        lower = ":".join(reversed(layers))
        place = target.with_name(target.name + ".d")
        place.mkdir(mode=0o700)
        try:
            run(["unshare", "--mount", "sh", "-c", script, "sh", lower, str(place), str(target)], package="util-linux")
        finally:
            place.rmdir()
    os.truncate(target, os.stat(target).st_size + _TAIL_BYTES)


def split(rootfs: Sequence[Mount]) -> tuple[list[Path], list[str], str]:
    """Return a root's ready images and its layers' directories, each lowest first, and the directory above them that
    is no layer yet (empty: there is none, or nothing in it)."""
    files: list[Path] = []
    directories: list[str] = []
    changing = ""
    for mount in rootfs:
        options = dict(option.partition("=")[::2] for option in mount.options)
        if mount.type == "overlay":
            directories += reversed([path for path in options.get("lowerdir", "").split(":") if path])
            upper = options.get("upperdir", "")
            # A snapshot that somebody has written to already; usually it is empty.
            if upper and os.listdir(upper):
                changing = upper
        elif mount.type in ("bind", "rbind", ""):
            # A view of an image's only layer is read-only; anything else can be written.
            if "ro" in mount.options:
                directories.append(mount.source)
            else:
                changing = mount.source
        elif mount.type == "erofs":
            files.append(Path(mount.source))
        else:
            raise UnimplementedError(
                f"the snapshotter hands over a mount of type {mount.type!r}, which no microVM can take",
                fix="use the overlayfs snapshotter",
            )
    if len(files) >= MAX_PER_CONTAINER:
        raise InvalidArgumentError(
            f"the image has {len(files)} layers, and a container of a pod takes {MAX_PER_CONTAINER}"
        )
    return files, directories, changing


def _key(layers: list[str]) -> str:
    """Name the content by the directory's identity: a snapshot's is never used for another layer, and inode and status
    change (which nobody can set, unlike other times) tell a new containerd root at the same place from the old one."""
    state = b"remora layer 2\n"
    for layer in layers:
        state += os.path.realpath(layer).encode() + b"\n"
        # The snapshot's own directory, too, which holds fs and work.
        for info in (os.stat(layer), os.stat(os.path.dirname(layer))):
            state += f"{info.st_dev} {info.st_ino} {info.st_ctime_ns}\n".encode()
    return hexdigest(state)[:40]
