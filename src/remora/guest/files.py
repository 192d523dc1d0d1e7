"""Files that the host puts into volumes and takes from them: ConfigMaps, Secrets, hosts files, termination messages.

What the host sends was read from the host's disk, so a path is checked here once more: nothing may leave its volume.
"""

from __future__ import annotations

import os
import stat

from remora.errors import InvalidArgumentError, NotFoundError
from remora.guest import system
from remora.wire.guest_pod_v1 import VOLUMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from remora.wire.guest_pod_v1 import File, PutFilesRequest


def put(request: PutFilesRequest) -> None:
    """Write the files in their order, then remove what is to go.

    Raises:
        InvalidArgumentError: a name leaves the volume, or a kind is unknown.
    """
    base = _volume(request.volume)
    os.makedirs(base, exist_ok=True)
    for file in request.files:
        _put(f"{base}/{_inside(file.path)}" if file.path else base, file)
    for path in request.remove:
        system.remove_tree(f"{base}/{_inside(path)}")


def get(volume: str, path: str, limit: int) -> bytes:
    """Return the last `limit` bytes of a file, which a container may have put anything in place of.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: it is no file: to open a pipe, or what a link leads to, could take for ever.
    """
    try:
        fd = os.open(f"{_volume(volume)}/{_inside(path)}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"the volume {volume} has no file {path!r}") from error
    except OSError as error:
        raise InvalidArgumentError(f"{path!r} in the volume {volume} cannot be read: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise InvalidArgumentError(f"{path!r} in the volume {volume} is no file")
        return os.pread(fd, limit, max(0, info.st_size - limit))
    finally:
        os.close(fd)


def take_text(path: str) -> str:
    """Return a file's text and remove it; empty if there is none."""
    try:
        text = system.read_text(path)
        os.unlink(path)
    except FileNotFoundError:
        return ""
    return text


def _put(path: str, file: File) -> None:
    if file.kind == "dir":
        os.makedirs(path, exist_ok=True)
    elif file.kind == "link":
        draft = path + ".remora-new"
        os.symlink(bytes(file.content).decode(), draft)
        os.rename(draft, path)
        return
    elif file.kind == "file":
        # In place: a container may hold the file itself as a mount.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if file.offset else os.O_TRUNC)
        fd = os.open(path, flags, 0o600)
        try:
            os.pwrite(fd, file.content, file.offset)
        finally:
            os.close(fd)
    else:
        raise InvalidArgumentError(f"file kind {file.kind!r} is none of: file, dir, link")
    os.chown(path, file.uid, file.gid)
    os.chmod(path, file.mode)


def _volume(name: str) -> str:
    if "/" in name or name in ("", ".", ".."):
        raise InvalidArgumentError(f"a volume cannot be called {name!r}")
    return f"{VOLUMES}/{name}"


def _inside(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise InvalidArgumentError(f"the path {path!r} does not stay within its volume")
    return path
