"""Makes small OCI layouts, docker archives and layers for the image tests, good ones and hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from remora.images.erofs import Node
from remora.images.erofs_read import ErofsReader
from remora.images.layer import is_whiteout, write_layer
from remora.images.limits import DEFAULT_LIMITS, Limits

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def member(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    target: str = "",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    xattrs: dict[str, bytes] | None = None,
    device: tuple[int, int] = (0, 0),
) -> tuple[tarfile.TarInfo, bytes]:
    """Return one member of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.uid, info.gid, info.mtime = kind, target, mode, uid, gid, mtime
    info.size = len(content)
    info.devmajor, info.devminor = device
    info.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in (xattrs or {}).items()
    }
    return info, content


def directory(name: str, mode: int = 0o755, **more: int) -> tuple[tarfile.TarInfo, bytes]:
    """Return a directory as a member of a tar."""
    return member(name, kind=tarfile.DIRTYPE, mode=mode, **more)  # type: ignore[arg-type]  # only numbers are passed


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """Return a symbolic link as a member of a tar."""
    return member(name, kind=tarfile.SYMTYPE, target=target)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return a tar with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def digest(data: bytes) -> str:
    """Return the digest of bytes as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def zstd(data: bytes) -> bytes:
    """Compress with the zstd program."""
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def packed(data: bytes, compression: str) -> bytes:
    """Compress with gzip, zstd or none."""
    if compression == "none":
        return data
    return zstd(data) if compression == "zstd" else gzip.compress(data)


class Layout:
    """An OCI image layout in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes, media_type: str, **more: object) -> dict[str, object]:
        """Store a blob; return its descriptor."""
        name = digest(data)
        (self.path / "blobs/sha256" / name.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": name, "size": len(data), **more}

    def image(
        self,
        layers: Sequence[bytes],
        *,
        compression: str = "gzip",
        architecture: str = "amd64",
        config: dict[str, object] | None = None,
        annotations: dict[str, str] | None = None,
        diff_ids: list[str] | None = None,
    ) -> dict[str, object]:
        """Store an image; return its descriptor, for an index."""
        described = {
            "architecture": architecture,
            "os": "linux",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(json.dumps(described).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": [self.blob(packed(layer, compression), "application/octet-stream") for layer in layers],
        }
        more: dict[str, object] = {"platform": {"os": "linux", "architecture": architecture}}
        if annotations:
            more["annotations"] = annotations
        return self.blob(json.dumps(manifest).encode(), MANIFEST, **more)

    def index(self, *manifests: dict[str, object]) -> Path:
        """Write index.json; return the layout's directory."""
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return self.path

    def as_tar(self, path: Path) -> Path:
        """Write the layout as a tar file."""
        with tarfile.open(path, "w") as archive:
            archive.add(self.path, ".")
        return path


def docker_archive(
    path: Path, layers: Sequence[bytes], tags: list[str], config: dict[str, object] | None = None
) -> Path:
    """Write what `docker save` wrote for years: config, layers and manifest.json in a tar."""
    described = {
        "architecture": "amd64",
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
    }
    raw = json.dumps(described).encode()
    config_name = f"{digest(raw).removeprefix('sha256:')}.json"
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": config_name, "RepoTags": tags, "Layers": names}]).encode()
    members = [member(name, layer) for name, layer in zip(names, layers, strict=True)]
    path.write_bytes(tar(*members, member(config_name, raw), member("manifest.json", manifest)))
    return path


def convert(data: bytes, path: Path, limits: Limits = DEFAULT_LIMITS) -> Path:
    """Convert a plain tar to an EROFS layer at `path`."""
    with open(path, "w+b") as out:
        write_layer(io.BytesIO(data), out, b"remora test uuid", limits)
    return path


def describe(path: Path) -> dict[str, tuple[object, ...]]:
    """Return everything about each path of a layer: kind, mode, owner, time, content or target, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    with ErofsReader(path) as reader:
        stack: list[tuple[str, Node]] = [("", reader.tree())]
        while stack:
            name, node = stack.pop()
            content = b"" if node.is_dir or is_whiteout(node) else b"".join(reader.data(node))
            kind = "whiteout" if is_whiteout(node) else stat.filemode(node.mode)
            found[name or "/"] = (kind, node.uid, node.gid, node.mtime_s, content, dict(node.xattrs))
            stack += [(f"{name}/{child.decode()}", item) for child, item in node.children.items()]
    return found
