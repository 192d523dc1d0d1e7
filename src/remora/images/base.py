"""Makes base images from Debian or Ubuntu packages with mmdebstrap: no registry needed, and each base is made once.

A base is an ordinary image of the store, named by its recipe, so listing, sharing and removing it need nothing new.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from remora.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError, UnavailableError
from remora.images.apt_sources import sources_for
from remora.images.blobs import Blob, convert_layer
from remora.images.model import Image, ImageConfig, machine_architecture
from remora.images.progress import Progress, silent
from remora.images.store import ImageStore
from remora.images.tools import contained

#: Files that a build makes get this time (2025-01-01), so that equal input gives equal bytes.
SOURCE_DATE_EPOCH = 1735689600
#: What every minimal base has: accounts, name resolution, a shell and tools in one small program.
_MINIMAL = ("base-files", "base-passwd", "busybox-static", "libc-bin", "netbase")
_HOOK = Path(__file__).with_name("debian_base.sh")
_STEPS = 8
#: A disk with less free is refused at once: the lists of packages, the root and its tar took 207 MB for the smallest
#: base with Python. While it runs, less than the second is a full disk, on which apt-get (2.6.1) may never end.
_NEEDED_BYTES = 200 << 20
_FULL_BYTES = 1 << 20
_WATCH_S = 0.5
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def debian_base(
    store: ImageStore,
    suite: str,
    variant: str,
    packages: tuple[str, ...],
    *,
    refresh: bool = False,
    progress: Progress = silent,
) -> Image:
    """Return the base image of these packages, made now unless the store has it.

    Args:
        store: where it is kept.
        suite: the release's code name, such as bookworm.
        variant: `minimal` (the packages with what they need, and busybox) or `minbase` (a small complete system).
        packages: sorted package names.
        refresh: make it anew from today's packages.
        progress: told each step.

    Raises:
        FailedPreconditionError: mmdebstrap is missing or may not work here.
        UnavailableError: packages cannot be fetched or do not exist; the message has apt's reason.
    """
    name = base_name(suite, variant, packages)
    if not refresh:
        try:
            return store.get(name)
        except NotFoundError:
            pass  # made below
    with store.adding() as adding:
        scratch = adding.scratch_dir()
        tar = scratch / "base.tar"
        make_base_tar(scratch, tar, suite, variant, packages, progress)
        progress(f"packing {name}", _STEPS, _STEPS)
        diff_id = add_tar(adding.layer, tar)
        config = ImageConfig(cmd=("/bin/sh",), env={"PATH": _PATH, "LANG": "C.UTF-8"})
        return adding.commit(name, image_digest(config, (diff_id,)), (diff_id,), config, machine_architecture(), "")


def base_name(suite: str, variant: str, packages: tuple[str, ...]) -> str:
    """Return the name of a base: its recipe in short, with a digest of all that shapes it."""
    recipe = json.dumps([suite, variant, packages, _MINIMAL, machine_architecture(), _HOOK.read_text()])
    return f"base/{suite}-{variant}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def image_digest(config: ImageConfig, layers: tuple[str, ...]) -> str:
    """Return the digest of an image that was made here: of its configuration and its layers."""
    content = json.dumps({"config": config.to_dict(), "layers": layers}, sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def add_tar(add_layer: Callable[[str, Callable[[BinaryIO], object]], Path], tar: Path) -> str:
    """Add a plain tar as a layer by `add_layer` (`Adding.layer`); return its digest."""
    with open(tar, "rb") as file:
        diff_id = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    blob = Blob(tar, 0, tar.stat().st_size)

    def write(out: BinaryIO) -> None:
        convert_layer(blob, diff_id, out)

    add_layer(diff_id, write)
    return diff_id


def make_base_tar(
    scratch: Path, tar: Path, suite: str, variant: str, packages: tuple[str, ...], progress: Progress
) -> None:
    """Have mmdebstrap write the root of these packages as `tar`; `scratch` is a directory for its own files.

    Raises:
        FailedPreconditionError: it is not installed.
        ResourceExhaustedError: the disk has too little space, now or on the way.
        UnavailableError: as for `debian_base`.
    """
    if shutil.which("mmdebstrap") is None:
        raise FailedPreconditionError(
            "mmdebstrap is not installed", fix="install the package mmdebstrap, or run make system"
        )
    is_root = os.geteuid() == 0
    # In a user namespace it needs a directory that its other users can enter, such as /tmp.
    places = (scratch,) if is_root else (scratch, Path(tempfile.gettempdir()))
    for place in places:
        if shutil.disk_usage(place).free < _NEEDED_BYTES:
            raise _full(place)
    include = sorted({*packages, *(_MINIMAL if variant == "minimal" else ())})
    sources = []
    for file_name, text in sources_for(suite).items():
        path = scratch / file_name
        path.write_text(text)
        sources.append(str(path))
    argv = [
        "mmdebstrap",
        f"--mode={'root' if is_root else 'unshare'}",
        f"--variant={'extract' if variant == 'minimal' else variant}",
        "--format=tar",
        *([f"--include={','.join(include)}"] if include else []),
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        "--skip=cleanup/apt",  # the hook does it
        # mmdebstrap runs no later hook for `extract`. The script goes as text: in a user namespace it runs
        # as another user, who may not enter the directory that Remora lies in.
        f"--{'extract' if variant == 'minimal' else 'customize'}-hook={_HOOK.read_text()}",
        suite,
        "-",
        *sources,
    ]
    environment = {
        **os.environ,
        "LC_ALL": "C.UTF-8",
        "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
        "REMORA_VARIANT": variant,
    }
    if is_root:
        environment["TMPDIR"] = str(scratch)
    lines: list[str] = []
    with (
        open(tar, "wb") as out,
        subprocess.Popen(
            contained(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        try:
            with _ended_on_full_disk(process, places) as full:
                for line in process.stderr or ():
                    lines.append(line.strip())
                    if line.startswith("I: "):
                        done = min(_STEPS - 1, sum(kept.startswith("I: ") for kept in lines))
                        progress(f"base {suite}: {line[3:].strip()}", done, _STEPS)
        except BaseException:
            process.kill()
            raise
    if full or (process.returncode != 0 and any(os.strerror(errno.ENOSPC) in line for line in lines)):
        raise _full(full[0] if full else scratch)
    if process.returncode != 0:
        # apt's own reasons are short; the long lines repeat the whole command.
        reasons = [line for line in lines if line.startswith("E: ") and len(line) < 200] or lines[-3:]
        raise UnavailableError(
            f"mmdebstrap could not make a base of {suite} with {', '.join(include) or 'no packages'}: "
            + "; ".join(reason.removeprefix("E: ") for reason in reasons[:3]),
            fix="install the distribution's keyring (debian-archive-keyring or ubuntu-keyring)"
            if any("is not signed" in reason for reason in reasons)
            else "check the package names, the suite and that apt-get update works here",
        )


@contextmanager
def _ended_on_full_disk(process: subprocess.Popen[str], places: Sequence[Path]) -> Iterator[list[Path]]:
    """Kill `process` once one of these is full; the list that this gives tells which."""
    found: list[Path] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_S):
            found.extend(place for place in places if shutil.disk_usage(place).free < _FULL_BYTES)
            if found:
                process.kill()
                return

    thread = threading.Thread(target=watch, name="full-disk", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _full(place: Path) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"too little space on the disk of {place}: the packages of a base take {_NEEDED_BYTES >> 20} MiB on the way",
        fix="free some, or point REMORA_STATE_DIR to another disk",
    )
