"""Writes an image as the tar of an OCI layout, as `ctr images import` and `skopeo copy oci-archive:` take it.

Layers go in as plain tars: their bytes do not depend on a compressor's version, and nobody waits for one. Equal layers
and configuration give an equal archive. Formats: OCI image-spec 1.1 (image-layout.md, manifest.md, config.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora.images.base import SOURCE_DATE_EPOCH
from remora.images.model import ImageConfig

_KIND = "application/vnd.oci.image"
_CREATED = "2025-01-01T00:00:00Z"  # SOURCE_DATE_EPOCH


@dataclass(frozen=True)
class _Blob:
    digest: str
    size: int
    source: Path | bytes

    def describe(self, kind: str) -> dict[str, Any]:
        return {"mediaType": f"{_KIND}.{kind}", "digest": f"sha256:{self.digest}", "size": self.size}


def write_oci_archive(path: Path, name: str, layers: Sequence[Path], config: ImageConfig, architecture: str) -> str:
    """Write the archive at once or not at all; return the digest of the image's manifest.

    Args:
        name: What the image is called after an import, such as `localhost/remora/agent:0.1.0`.
        layers: Plain tars, the lowest first.
    """
    blobs = [_of_file(layer) for layer in layers]
    described = _of_bytes(_json(_image(blobs, config, architecture)))
    manifest = _of_bytes(
        _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{_KIND}.manifest.v1+json",
                "config": described.describe("config.v1+json"),
                "layers": [blob.describe("layer.v1.tar") for blob in blobs],
            }
        )
    )
    entry = manifest.describe("manifest.v1+json") | {
        "platform": {"os": "linux", "architecture": architecture},
        "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name},
    }
    index = {"schemaVersion": 2, "mediaType": f"{_KIND}.index.v1+json", "manifests": [entry]}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, "oci-layout", _of_bytes(b'{"imageLayoutVersion":"1.0.0"}'))
            _add(archive, "index.json", _of_bytes(_json(index)))
            for blob in {blob.digest: blob for blob in (manifest, described, *blobs)}.values():
                _add(archive, f"blobs/sha256/{blob.digest}", blob)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return f"sha256:{manifest.digest}"


def _image(blobs: Sequence[_Blob], config: ImageConfig, architecture: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "User": config.user,
        "Env": [f"{key}={value}" for key, value in sorted(config.env.items())],
        "Entrypoint": list(config.entrypoint),
        "Cmd": list(config.cmd),
        "WorkingDir": config.cwd,
        "Labels": dict(sorted(config.labels.items())),
        "StopSignal": config.stop_signal,
    }
    return {
        "created": _CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {key: value for key, value in values.items() if value},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{blob.digest}" for blob in blobs]},
    }


def _of_bytes(data: bytes) -> _Blob:
    return _Blob(hashlib.sha256(data).hexdigest(), len(data), data)


def _of_file(path: Path) -> _Blob:
    with path.open("rb") as file:
        return _Blob(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size, path)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _add(archive: tarfile.TarFile, name: str, blob: _Blob) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = blob.size, 0o644, SOURCE_DATE_EPOCH
    if isinstance(blob.source, bytes):
        archive.addfile(info, io.BytesIO(blob.source))
    else:
        with blob.source.open("rb") as file:
            archive.addfile(info, file)
