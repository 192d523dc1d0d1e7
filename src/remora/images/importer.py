"""Brings an image that somebody else built into the store: checked to the last byte, then converted layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from remora.errors import InvalidArgumentError, NotFoundError
from remora.images.archives import Files, ImageSource, Layer, find_image
from remora.images.blobs import convert_layer, copy_unpacked
from remora.images.limits import DEFAULT_LIMITS, Limits
from remora.images.model import Image, full_name
from remora.images.progress import Progress, silent
from remora.images.store import Adding, ImageStore

_WHAT_IT_TAKES = "import takes an OCI layout, as a directory or tar, or a file that docker save wrote"


def import_image(
    store: ImageStore,
    source: Path,
    *,
    name: str | None = None,
    reference: str | None = None,
    architecture: str | None = None,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> Image:
    """Import an OCI layout (directory or tar, the tar also compressed) or a docker-archive.

    Args:
        store: where to.
        source: the directory or file.
        name: what to call the image; by default what the archive calls it, else the file's name.
        reference: which image to take when the archive has several.
        architecture: as OCI names it; this machine's by default.
        progress: told the bytes read of each layer.
        limits: what one layer may unpack to.

    Raises:
        NotFoundError, InvalidArgumentError, DataLossError, ResourceExhaustedError: nothing was added then.
    """
    if not source.exists():
        raise NotFoundError(f"there is no {source} to import", fix=_WHAT_IT_TAKES)
    with store.adding() as adding:
        path = source
        if source.is_file():
            unpacked = adding.scratch_dir() / "image.tar"
            with open(unpacked, "wb") as file:
                if copy_unpacked(source, file, limits):
                    path = unpacked
        try:
            found = find_image(Files(path), reference, architecture)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"{source} cannot be imported: {error.message}", fix=error.fix or _WHAT_IT_TAKES
            ) from error
        return add_source(adding, found, name or default_name(found, source), progress=progress, limits=limits)


def add_source(
    adding: Adding, source: ImageSource, name: str, *, progress: Progress = silent, limits: Limits = DEFAULT_LIMITS
) -> Image:
    """Convert the layers of `source` and write its record under `name`."""
    full = full_name(name)
    layers = topmost(layer.diff_id for layer in source.layers)
    by_digest = {layer.diff_id: layer for layer in source.layers}
    for number, diff_id in enumerate(layers, 1):
        step = f"layer {number} of {len(layers)}"
        layer = by_digest[diff_id]
        progress(step, 0, layer.blob.size_bytes)
        adding.layer(diff_id, _writer(layer, step, progress, limits))
        progress(step, layer.blob.size_bytes, layer.blob.size_bytes)
    return adding.commit(full, source.digest, layers, source.config, source.architecture, source.created)


def topmost(layers: Iterable[str]) -> tuple[str, ...]:
    """Drop all but the topmost of equal layers: overlayfs refuses a layer twice, and the topmost hides the others."""
    seen: dict[str, None] = {}
    for layer in reversed(list(layers)):
        seen.setdefault(layer)
    return tuple(reversed(seen))


def default_name(found: ImageSource, source: Path) -> str:
    """Return the name that the archive gives its image, else one made of the file's name."""
    stem = re.sub(r"[^a-z0-9]+", "-", source.name.lower().split(".")[0]).strip("-") or "image"
    if not found.name:
        return stem
    is_tag_only = not re.search("[/:]", found.name)
    return f"{stem}:{found.name}" if is_tag_only else found.name


def _writer(layer: Layer, step: str, progress: Progress, limits: Limits) -> Callable[[BinaryIO], object]:
    def tell(done: int) -> None:
        progress(step, done, layer.blob.size_bytes)

    def write(out: BinaryIO) -> None:
        convert_layer(layer.blob, layer.diff_id, out, limits=limits, on_bytes=tell)

    return write
