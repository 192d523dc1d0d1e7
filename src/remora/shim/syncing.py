"""Copies of the host's files in the guest, kept up to date: ConfigMaps, Secrets, projected tokens, hosts files.

The kubelet changes such a volume by making a new directory and turning one link, `..data`, to it. So does the guest:
new files first, the link last and in one step, what is gone afterwards; a reader sees the old or the new volume, never
a mixture. The shim looks once a second (an inotify watch would not see what the kubelet mounts later).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from remora.errors import ResourceExhaustedError
from remora.shim.volumes import FILE_NAME, Volume
from remora.wire import guest_pod_v1 as v1

INTERVAL_S = 1.0
#: Of one volume: ConfigMaps and Secrets are at most 1 MiB each, and a projected volume has a few of them.
MAX_VOLUME_BYTES = 32 << 20

#: path below the volume -> what a change of it changes.
State = dict[str, tuple[object, ...]]
Put = Callable[[v1.PutFilesRequest], None]


class Copies:
    """The synced volumes of one pod. Used by one thread at a time; `put` is the guest's PutFiles."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self._volumes: dict[str, Volume] = {}
        self._states: dict[str, State] = {}

    def add(self, volume: Volume) -> None:
        """Send a volume for the first time; once it is known, nothing happens."""
        if volume.name in self._volumes:
            return
        self._send(volume, {})
        self._volumes[volume.name] = volume

    def seed(self, volume: Volume) -> None:
        """Send what lies in a directory that is the guest's from then on."""
        self._send(volume, {})

    def changed(self) -> list[Volume]:
        """Return the volumes that the host has changed. Cheap, and safe in any thread."""
        found = []
        for volume in list(self._volumes.values()):
            if not volume.returned and _state(volume) != self._states.get(volume.name):
                found.append(volume)
        return found

    def update(self, volume: Volume) -> None:
        self._send(volume, self._states.get(volume.name, {}))

    def _send(self, volume: Volume, before: State) -> None:
        state = _state(volume)
        new = [path for path, mark in state.items() if before.get(path) != mark]
        # Directories and files as they lie, then links: those that other names lead through come last.
        links = sorted((path for path in new if state[path][0] == "link"), key=lambda path: path == "..data")
        gone = [path for path in before if path not in state]
        batch = v1.PutFilesRequest(volume=volume.name)
        size = 0
        for path in [*(path for path in new if state[path][0] != "link"), *links]:
            for file in _read(volume, path):
                batch.files.append(file)
                size += len(file.content)
                if size >= v1.MAX_PART_BYTES:
                    self._put(batch)
                    batch, size = v1.PutFilesRequest(volume=volume.name), 0
        batch.remove.extend(gone)
        self._put(batch)
        self._states[volume.name] = state


def bring_back(volume: Volume, content: bytes) -> None:
    """Write a file's content in the guest to its place on the host."""
    fd = os.open(volume.source, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def _state(volume: Volume) -> State:
    state: State = {}
    total = 0
    for path, full in _entries(volume):
        try:
            info = os.lstat(full)
            if stat.S_ISLNK(info.st_mode):
                state[path] = ("link", os.readlink(full))
            elif stat.S_ISDIR(info.st_mode):
                state[path] = ("dir", info.st_mode, info.st_uid, info.st_gid)
            elif stat.S_ISREG(info.st_mode):
                mark = (info.st_mode, info.st_uid, info.st_gid, info.st_size, info.st_mtime_ns, info.st_ino)
                state[path] = ("file", *mark)
                total += info.st_size
        except FileNotFoundError:
            continue  # replaced this moment: the next look sees what came
    if total > MAX_VOLUME_BYTES:
        raise ResourceExhaustedError(
            f"the volume {volume.source} has {total} bytes; a copied one may have {MAX_VOLUME_BYTES}",
            fix="bring so much data in an image, or as a read-only hostPath",
        )
    return state


def _entries(volume: Volume) -> Iterator[tuple[str, str]]:
    """Yield (path below the volume, path on the host), parents first."""
    if volume.is_file:
        yield FILE_NAME, volume.source
        return
    yield "", volume.source
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            names = sorted(os.listdir(os.path.join(volume.source, folder)))
        except FileNotFoundError:
            continue
        for name in names:
            path = f"{folder}/{name}" if folder else name
            full = f"{volume.source}/{path}"
            yield path, full
            if os.path.isdir(full) and not os.path.islink(full):
                waiting.append(path)


def _read(volume: Volume, path: str) -> Iterator[v1.File]:
    full = volume.source if volume.is_file or not path else f"{volume.source}/{path}"
    try:
        info = os.stat(full) if volume.is_file else os.lstat(full)
        mode, uid, gid = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
        if stat.S_ISLNK(info.st_mode):
            yield v1.File(path=path, kind="link", content=os.readlink(full).encode())
        elif stat.S_ISDIR(info.st_mode):
            yield v1.File(path=path, kind="dir", mode=mode, uid=uid, gid=gid)
        elif stat.S_ISREG(info.st_mode):
            with open(full, "rb") as file:
                offset = 0
                while True:
                    part = file.read(v1.MAX_PART_BYTES)
                    if part or not offset:
                        yield v1.File(path=path, kind="file", mode=mode, uid=uid, gid=gid, content=part, offset=offset)
                    if len(part) < v1.MAX_PART_BYTES:
                        return
                    offset += len(part)
    except FileNotFoundError:
        return
