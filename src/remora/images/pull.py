"""Gets an image from a registry: skopeo speaks to it (logins, mirrors, proxies), what arrives is then imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from remora.errors import FailedPreconditionError, NotFoundError, UnauthenticatedError, UnavailableError
from remora.images.archives import Files, find_image
from remora.images.importer import add_source
from remora.images.model import Image, full_name, machine_architecture
from remora.images.progress import Progress, silent
from remora.images.store import ImageStore
from remora.images.tools import leashed

_TRANSPORTS = ("docker://", "oci:", "oci-archive:", "docker-archive:", "docker-daemon:", "containers-storage:", "dir:")


def pull_image(
    store: ImageStore, reference: str, *, name: str | None = None, tls_verify: bool = True, progress: Progress = silent
) -> Image:
    """Copy `reference` (a registry's, or any source that skopeo knows, such as docker-daemon:NAME) into the store.

    Raises:
        FailedPreconditionError: skopeo is not installed.
        UnavailableError, NotFoundError, UnauthenticatedError: the registry cannot be reached, has no such image, or
            asks for a login.
    """
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        raise FailedPreconditionError(
            "skopeo is not installed", fix="install the package skopeo (apt-get install skopeo)"
        )
    plain = reference if reference.startswith(_TRANSPORTS) else f"docker://{reference}"
    called = name or _called(plain)
    full_name(called)
    with store.adding() as adding:
        layout = adding.scratch_dir() / "layout"
        argv = [skopeo, "copy", "--override-os=linux", f"--override-arch={machine_architecture()}"]
        if not tls_verify:
            argv.append("--src-tls-verify=false")
        _copy([*argv, plain, f"oci:{layout}:image"], reference, progress)
        return add_source(adding, find_image(Files(layout)), called, progress=progress)


def _copy(argv: list[str], reference: str, progress: Progress) -> None:
    steps = 0
    last = ""
    progress(f"pulling {reference}", 0, 0)
    environment = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(
        leashed(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        try:
            for line in process.stdout or ():
                last = line.strip() or last
                if line.startswith("Copying"):
                    steps += 1
                    progress(f"pulling {reference}: {last[:60]}", steps, 0)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _error(reference, last)


def _error(reference: str, line: str) -> NotFoundError | UnauthenticatedError | UnavailableError:
    found = re.search(r'msg="(.*)"', line)
    reason = (found.group(1) if found else line).replace('\\"', '"')[-300:]
    what = f"cannot pull {reference}: {reason}"
    lower = reason.lower()
    if "unauthorized" in lower or "authentication required" in lower or "denied" in lower:
        return UnauthenticatedError(what, fix="log in with skopeo login REGISTRY, and check the name")
    if "manifest unknown" in lower or "not found" in lower or "no such file" in lower or "no image found" in lower:
        return NotFoundError(what, fix="check the name and the tag")
    return UnavailableError(
        what, fix="check the registry's name and the network; without a registry use remora image import"
    )


def _called(reference: str) -> str:
    """The name in a skopeo source: without the transport, and without a digest."""
    rest = reference.partition("://")[2] or reference.partition(":")[2]
    path, _, _ = rest.partition("@")
    if reference.startswith(("oci:", "oci-archive:", "docker-archive:", "dir:")):
        return re.sub(r"[^a-z0-9]+", "-", Path(path.split(":")[0]).name.lower().split(".")[0]).strip("-") or "image"
    return path
