"""Finds the image in what people have: an OCI layout (directory or tar) or the tar of `docker save`.

Reads only what describes the image; the layers stay where they are, as ranges of a file, until they are converted.
Formats: OCI image-spec 1.1 (image-layout.md, image-index.md, manifest.md, config.md) and Docker's image archive.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora.errors import DataLossError, InvalidArgumentError, NotFoundError
from remora.images.blobs import Blob
from remora.images.model import ImageConfig, check_digest, machine_architecture
from remora.images.tarstream import TarReader

_JSON_LIMIT = 4 << 20
_MAX_LAYERS = 512
_MAX_NESTING = 4
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_EXPECTED = "give an OCI image layout (directory or tar) or the tar that docker save writes"

Json = Any  # parsed JSON, checked where it is read


@dataclass(frozen=True)
class Layer:
    """A layer as its image describes it: the packed bytes, and the digest of what they unpack to."""

    blob: Blob
    diff_id: str


@dataclass(frozen=True)
class ImageSource:
    """An image found in an archive, nothing of it converted yet."""

    name: str | None
    digest: str
    layers: tuple[Layer, ...]
    config: ImageConfig
    architecture: str
    created: str


class Files:
    """The files of a layout: a directory, or the members of an uncompressed tar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._links: dict[str, str] = {}
        self._members: dict[str, tuple[int, int]] | None = None if path.is_dir() else self._index(path)

    def find(self, name: str, digest: str | None = None) -> Blob | None:
        """Return the file `name`, or None."""
        name = posixpath.normpath(name)
        if name.startswith(("..", "/")):
            raise InvalidArgumentError(f"the image refers to {name!r}, outside of {self.path}")
        if self._members is None:
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise InvalidArgumentError(f"{file} is a link out of the image's directory")
            return Blob(file, 0, file.stat().st_size, digest) if file.is_file() else None
        for _ in range(8):  # older docker save stores equal layers as links
            if name not in self._links:
                break
            name = self._links[name]
        if name not in self._members:
            return None
        offset, size = self._members[name]
        return Blob(self.path, offset, size, digest)

    def json(self, name: str) -> Json | None:
        """Return a JSON file's content, or None when there is no such file."""
        blob = self.find(name)
        return None if blob is None else parse_json(blob, name)

    def blob(self, descriptor: Json, what: str) -> Blob:
        """Return the blob of an OCI descriptor, its size checked; its digest is checked when it is read."""
        if not isinstance(descriptor, dict):
            raise InvalidArgumentError(f"{what} in {self.path} has no descriptor")
        digest = check_digest(descriptor.get("digest"), f"{what} in {self.path}")
        found = self.find(f"blobs/sha256/{digest.removeprefix('sha256:')}", digest)
        if found is None:
            raise NotFoundError(
                f"{what} ({digest}) is missing in {self.path}", fix="the copy is incomplete; make it again"
            )
        if descriptor.get("size") != found.size_bytes:
            raise DataLossError(
                f"{what} ({digest}) in {self.path} has {found.size_bytes} bytes instead of {descriptor.get('size')}",
                fix="get the image again from its source",
            )
        return found

    def _index(self, path: Path) -> dict[str, tuple[int, int]]:
        members: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as file:
            for entry in TarReader(file):
                name = posixpath.normpath(entry.path.decode("utf-8", "surrogateescape")).lstrip("/")
                if entry.kind == "file":
                    members[name] = (file.tell(), entry.size_bytes)
                elif entry.kind in ("symlink", "link"):
                    target = entry.target.decode("utf-8", "surrogateescape")
                    base = posixpath.dirname(name) if entry.kind == "symlink" else ""
                    self._links[name] = posixpath.normpath(posixpath.join(base, target))
                if len(members) > 10_000:
                    raise InvalidArgumentError(
                        f"{path} has more than 10000 files: this is no image archive", fix=_EXPECTED
                    )
        return members


def parse_json(blob: Blob, what: str) -> Json:
    """Return the document in `blob`, verified against its digest."""
    try:
        return json.loads(blob.read_small(_JSON_LIMIT, what))
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} is no valid JSON: {error}") from error


def find_image(files: Files, reference: str | None = None, architecture: str | None = None) -> ImageSource:
    """Return the one image in `files` for this machine; `reference` chooses when there are several.

    Raises:
        InvalidArgumentError: this is no image, or the choice is not clear; the message lists what there is.
        NotFoundError: there is no image of that reference or architecture, or a part is missing.
        DataLossError: a part does not match its digest.
    """
    wanted = architecture or machine_architecture()
    index = files.json("index.json")
    if index is not None:
        return _from_layout(files, index, reference, wanted)
    manifest = files.json("manifest.json")
    if manifest is not None:
        return _from_docker(files, manifest, reference, wanted)
    raise InvalidArgumentError(f"{files.path} has neither index.json nor manifest.json", fix=_EXPECTED)


def _from_layout(files: Files, index: Json, reference: str | None, wanted: str) -> ImageSource:
    candidates = [entry for entry in _list(index, "manifests", "index.json") if not _is_attestation(entry)]
    named = {_reference(entry): entry for entry in candidates}
    if reference is not None:
        chosen = [entry for name, entry in named.items() if name is not None and _matches(name, reference)]
        if not chosen:
            raise NotFoundError(f"{files.path} has no image {reference!r}; it has: {_names(named)}")
    else:
        chosen = candidates
    if len({_reference(entry) for entry in chosen}) > 1:
        raise InvalidArgumentError(f"{files.path} has several images: {_names(named)}", fix="choose one with --ref")
    descriptor = _for_machine(files, chosen, wanted, 0)
    manifest = parse_json(files.blob(descriptor, "the manifest"), "the manifest")
    config = parse_json(files.blob(manifest.get("config"), "the configuration"), "the configuration")
    layers = _list(manifest, "layers", "the manifest")
    blobs = [files.blob(layer, "a layer") for layer in layers]
    name = _reference(chosen[0])
    return _source(name, str(descriptor["digest"]), blobs, config, wanted)


def _from_docker(files: Files, manifest: Json, reference: str | None, wanted: str) -> ImageSource:
    entries = manifest if isinstance(manifest, list) else []
    named = {tag: entry for entry in entries for tag in (entry.get("RepoTags") or [None])}
    if reference is not None:
        entries = [entry for tag, entry in named.items() if tag is not None and _matches(tag, reference)]
    if len(entries) != 1:
        raise InvalidArgumentError(
            f"{files.path} has {len(entries)} images{' of that name' if reference else ''}: {_names(named)}",
            fix="choose one with --ref",
        )
    entry = entries[0]
    config_name = str(entry.get("Config", ""))
    stem = posixpath.basename(config_name).removesuffix(".json")
    digest = f"sha256:{stem}"
    blob = files.find(config_name, check_digest(digest, f"the configuration's name in {files.path}"))
    if blob is None:
        raise NotFoundError(f"the configuration {config_name!r} is missing in {files.path}")
    blobs = []
    for layer in _list(entry, "Layers", "manifest.json"):
        found = files.find(str(layer))
        if found is None:
            raise NotFoundError(
                f"the layer {layer!r} is missing in {files.path}", fix="the copy is incomplete; make it again"
            )
        blobs.append(found)
    tags = entry.get("RepoTags") or [None]
    return _source(reference or tags[0], digest, blobs, parse_json(blob, "the configuration"), wanted)


def _source(name: str | None, digest: str, blobs: list[Blob], config: Json, wanted: str) -> ImageSource:
    if not isinstance(config, dict):
        raise InvalidArgumentError("the image's configuration is no JSON object")
    architecture = str(config.get("architecture", wanted))
    if architecture != wanted or config.get("os", "linux") != "linux":
        raise NotFoundError(f"the image is for {config.get('os')}/{architecture}; this machine needs linux/{wanted}")
    rootfs = config.get("rootfs")
    diff_ids = _list(rootfs if isinstance(rootfs, dict) else {}, "diff_ids", "the configuration's rootfs")
    if len(diff_ids) != len(blobs):
        raise InvalidArgumentError(f"the image has {len(blobs)} layers but its configuration names {len(diff_ids)}")
    layers = tuple(
        Layer(blob, check_digest(diff_id, "a diff_id of the configuration"))
        for blob, diff_id in zip(blobs, diff_ids, strict=True)
    )
    return ImageSource(
        name, digest, layers, _config(config.get("config") or {}), architecture, str(config.get("created") or "")
    )


def _config(values: Mapping[str, Json]) -> ImageConfig:
    try:
        return ImageConfig(
            entrypoint=_strings(values.get("Entrypoint")),
            cmd=_strings(values.get("Cmd")),
            env=dict(item.partition("=")[::2] for item in _strings(values.get("Env"))),
            cwd=str(values.get("WorkingDir") or "/"),
            user=str(values.get("User") or ""),
            labels={str(key): str(value) for key, value in (values.get("Labels") or {}).items()},
            exposed_ports=tuple(str(port) for port in (values.get("ExposedPorts") or {})),
            stop_signal=str(values.get("StopSignal") or "SIGTERM"),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"the image's configuration is malformed: {error}") from error


def _for_machine(files: Files, entries: list[Json], wanted: str, depth: int) -> Json:
    """Follow indexes down to the manifest for linux on the wanted architecture."""
    platforms = []
    for entry in entries:
        if entry.get("mediaType") in _INDEXES:
            if depth >= _MAX_NESTING:
                raise InvalidArgumentError("the image's indexes are nested too deeply")
            nested = parse_json(files.blob(entry, "an index"), "an index")
            usable = [item for item in _list(nested, "manifests", "an index") if not _is_attestation(item)]
            return _for_machine(files, usable, wanted, depth + 1)
        platform = entry.get("platform") or {}
        if platform.get("architecture", wanted) == wanted and platform.get("os", "linux") == "linux":
            return entry
        platforms.append(f"{platform.get('os')}/{platform.get('architecture')}")
    raise NotFoundError(
        f"the image is not there for linux/{wanted}; it is there for: {', '.join(platforms) or 'nothing'}"
    )


def _is_attestation(entry: Json) -> bool:
    if not isinstance(entry, dict):
        raise InvalidArgumentError("an entry of the image's index is no descriptor")
    return (entry.get("platform") or {}).get("os") == "unknown"


def _list(document: Json, key: str, what: str) -> list[Json]:
    values = document.get(key) if isinstance(document, dict) else None
    if not isinstance(values, list) or len(values) > _MAX_LAYERS:
        raise InvalidArgumentError(f"{what} has no usable list {key!r} (at most {_MAX_LAYERS} entries)")
    return values


def _strings(values: Json) -> tuple[str, ...]:
    if isinstance(values, str):
        return (values,)
    return tuple(str(value) for value in values or ())


def _reference(entry: Json) -> str | None:
    annotations = entry.get("annotations") or {}
    return next((str(annotations[key]) for key in _NAME_KEYS if key in annotations), None)


def _matches(name: str, reference: str) -> bool:
    return name == reference or name.endswith(f"/{reference}") or name == f"{reference}:latest"


def _names(named: Mapping[str | None, Json]) -> str:
    return ", ".join(sorted(str(name) for name in named if name is not None)) or "images without names"
