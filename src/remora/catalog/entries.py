"""From a directory of manifests to the models that an agent offers.

The agent must not import this room (it talks to workers, and takes the catalogue as values); whoever starts an agent
loads the catalogue and hands it over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from remora import paths
from remora.catalog.manifest import FILE_NAME, Manifest, read_manifest
from remora.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from remora.workers.contract import ModelSource


@dataclass(frozen=True)
class ModelMetadata:
    """What is known of a model without loading it."""

    description: str
    licence: str
    source: str
    size_bytes: int


@dataclass(frozen=True)
class CatalogEntry:
    name: str
    manifest: Manifest
    directory: Path
    source: ModelSource
    info: ModelMetadata
    labels: tuple[str, ...]


def models_dir() -> Path:
    """Return where built models and the operator's own lie."""
    return paths.state_dir() / "models"


def load_catalog(directory: Path | None = None) -> dict[str, CatalogEntry]:
    """Load every manifest of a directory: `<name>/manifest.toml`, or `<name>.toml` beside its files.

    A directory that does not exist is an empty catalogue.

    Raises:
        InvalidArgumentError: a manifest is wrong, or its labels are.
        NotFoundError: a manifest names a file that is not there.
        AlreadyExistsError: two manifests have one name.
    """
    directory = directory or models_dir()
    entries: dict[str, CatalogEntry] = {}
    for path in sorted([*directory.glob(f"[!.]*/{FILE_NAME}"), *directory.glob("[!.]*.toml")]):
        entry = load_entry(path)
        if entry.name in entries:
            raise AlreadyExistsError(
                f"{path} and {entries[entry.name].directory} both describe model {entry.name!r}", fix="rename one"
            )
        entries[entry.name] = entry
    return entries


def load_entry(path: Path) -> CatalogEntry:
    """Load one manifest and look at the files it names. Raises as `load_catalog`."""
    manifest = read_manifest(path)
    file = path.parent / manifest.file
    if not file.is_file():
        raise NotFoundError(f"{path} names {manifest.file}, which is not there", fix=f"put the model at {file}")
    labels = _read_labels(path, manifest)
    digest = manifest.sha256 or _sha256(file)
    source = ModelSource(
        key=manifest.name,
        digest=f"sha256:{digest}",
        path=file,
        format=manifest.format,
        task=manifest.task,
        manifest={
            "preprocess": manifest.preprocess,
            **manifest.answer(),
            "labels": labels,
            "batching": manifest.batching,
        },
        inputs=manifest.inputs,
        outputs=manifest.outputs,
    )
    info = ModelMetadata(manifest.description, manifest.licence, manifest.source, file.stat().st_size)
    return CatalogEntry(manifest.name, manifest, path.parent, source, info, labels)


def _read_labels(path: Path, manifest: Manifest) -> tuple[str, ...]:
    if not manifest.labels:
        return ()
    file = path.parent / manifest.labels
    try:
        labels = tuple(file.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} names {manifest.labels}, which is not there", fix="one label a line") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file} is not UTF-8 text") from error
    if not labels:
        raise InvalidArgumentError(f"{file} has no labels", fix="one label a line, in the order of the classes")
    return labels


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
