"""Which guest OS image microVMs boot: the newest one, built when what it is made from has changed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from remora.sha256 import hexdigest

Progress = Callable[[str, float], None]
_PACKAGE = Path(__file__).resolve().parent.parent


class GuestFiles(NamedTuple):
    """The guest OS: kernel, initrd and the disk that all microVMs share."""

    kernel: Path
    initrd: Path
    disk: Path


def guest_files(state_dir: Path, progress: Progress | None = None) -> GuestFiles:
    """Return the guest OS image, built first if what it is made from has changed.

    To know whether it has, the builder must ask the package manager (a second). So the answer is kept for as long as
    Remora's own sources are the same; `remora image guest` asks again.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_note(state_dir).read_text())
        files = GuestFiles(*(Path(kept[name]) for name in GuestFiles._fields))
        if kept["fingerprint"] == fingerprint_of() and all(file.is_file() for file in files):
            return files
    return renew_guest_files(state_dir, progress)


def renew_guest_files(state_dir: Path, progress: Progress | None = None, *, force: bool = False) -> GuestFiles:
    """Build the guest OS image if sources or packages have changed (or if `force`); the next microVM boots it."""
    from remora.images.guest_os import build_guest_image

    fingerprint = fingerprint_of()
    image = build_guest_image(state_dir, force=force, progress=progress)
    files = GuestFiles(image.kernel, image.initrd, image.disk)
    note = _note(state_dir)
    draft = note.with_name(f".current.{os.getpid()}")
    draft.write_text(note_text(files, fingerprint))
    draft.replace(note)
    return files


def note_text(files: GuestFiles, fingerprint: str) -> str:
    """Return what `guest/current.json` says where this image belongs to sources of that fingerprint."""
    return json.dumps({"fingerprint": fingerprint, **{k: str(v) for k, v in files._asdict().items()}})


def _note(state_dir: Path) -> Path:
    return state_dir / "guest" / "current.json"


def fingerprint_of(package: Path = _PACKAGE) -> str:
    """Return what changes with the sources of a `remora` package that an image was made from."""
    state = b""
    for folder in ("", "wire", "client", "guest", "images"):
        for entry in sorted(os.scandir(package / folder), key=lambda entry: entry.name):
            if entry.name.endswith((".py", ".sh")):
                info = entry.stat()
                state += f"{folder}/{entry.name} {info.st_mtime_ns} {info.st_size}\n".encode()
    return hexdigest(state)
